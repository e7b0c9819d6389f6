"""Working memory of a step, held between steps on a CPU, where asking for it anew is slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .layout import LARGEST_STACK
from .stack import Stack

# At most so many elements of gradients are held from one pass to the next, 64 MiB: beside them and the four stacks,
# what unpacking 8-bit states needs still fits into 256 MiB.
_LARGEST_HELD = 2**24


class Work(NamedTuple):
    """Memory for one stack, each (tensors, rows, columns) float32; None to allocate it when it is needed.

    Attributes:
        gradients: for the gradients; if they are held, nobody else gets it before the step ends.
        drive: for what drives the momentum; unless gradients are held it is the memory of the weights, which are
            gathered only when the drive is no longer needed.
        weights: for the weights.
        scaled: for the scaled gradient, and the update that it becomes.
        scratch: for whatever lies in between.
    """

    gradients: Tensor | None = None
    drive: Tensor | None = None
    weights: Tensor | None = None
    scaled: Tensor | None = None
    scratch: Tensor | None = None


class Workspace:
    """Lends the same memory to one stack after the other, and decides whose gradients outlast the first pass of a step.

    Gradients that are held need not be gathered and cleaned a second time. All of a small LoRA's are; if a single
    tensor is too large for the workspace none are, because it may need all the memory that a step is allowed.

    Memory is lent for CPUs: malloc returns blocks of this size to the system and takes them back page by page, which
    can cost half as much again as the arithmetic. PyTorch's allocator for GPUs holds its blocks itself. At most it
    has memory for four stacks of the largest size that `layout` builds, 100 MiB, and for 64 MiB of gradients.
    """

    def __init__(self) -> None:
        self._memory = self._held = _memory(0)
        # Weak: a stack that the layout gives up between two steps must not keep its states alive.
        self._places: WeakKeyDictionary[Stack, int] = WeakKeyDictionary()

    def begin_step(self, stacks: Sequence[Stack]) -> None:
        """Decide which gradients are held in a step over some stacks."""
        self._places = WeakKeyDictionary()
        held = end = 0
        if all(stack.numel() <= LARGEST_STACK for stack in stacks):
            for stack in stacks:
                size = stack.numel()
                if held + size <= _LARGEST_HELD:
                    held += size
                    self._places[stack] = end
                    end += size if stack.device.type == "cpu" else 0
        if self._held.numel() < end or end == 0:
            self._held = _memory(0)  # Free before there is more.
            self._held = _memory(end)

    def holds(self, stack: Stack) -> bool:
        """Whether the gradients of a stack are held until the step ends."""
        return stack in self._places

    def lend(self, stack: Stack) -> Work:
        """Memory for a stack, until the next call."""
        size = stack.numel()
        if stack.device.type != "cpu":
            return Work()
        if size > LARGEST_STACK:  # A single tensor, which may need all the memory that a step is allowed.
            self._memory = _memory(0)
            return Work()
        shape = (len(stack), stack.rows, stack.columns)
        if self._memory.numel() < 4 * size:
            self._memory = _memory(0)  # Free before there is more.
            self._memory = _memory(4 * size)
        first, weights, scaled, scratch = self._memory[: 4 * size].view(4, *shape).unbind()
        if stack not in self._places:
            return Work(first, weights, weights, scaled, scratch)
        start = self._places[stack]
        return Work(self._held[start : start + size].view(shape), first, weights, scaled, scratch)


def _memory(count: int) -> Tensor:
    # Explicit dtype and device: users may have set other defaults.
    return torch.empty(count, dtype=torch.float32, device="cpu")

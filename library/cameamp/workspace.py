"""Working memory of a step, kept between steps where that is faster than asking for it anew."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .batches import LARGEST_STACK, Batch

# At most so many elements of gradients are kept from one pass to the next, 64 MiB: beside them and the four stacks,
# what unpacking 8-bit states needs still fits into 256 MiB.
_LARGEST_KEPT = 2**24

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Work(NamedTuple):
    """Memory for one stack, each (tensors, rows, columns) float32; None where it is to be allocated when needed.

    Attributes:
        gradients: for the gradients; where they are kept, nobody else gets it before the step ends.
        drive: for what drives the momentum; without kept gradients it is the memory of the weights, which are gathered
            after that.
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

    Gradients that are kept need not be gathered and cleaned a second time. All of a small LoRA's are; where a single
    tensor is too large for the workspace none are, because it may need all the memory that a step is allowed.

    Memory is lent for CPUs: malloc returns blocks of this size to the system and takes them back page by page, which
    can cost half as much again as the arithmetic. PyTorch's allocator for GPUs keeps its blocks, so nothing is held
    there. Never more than four stacks of the largest size that `batches` builds, 100 MiB, and 64 MiB of gradients.
    """

    def __init__(self) -> None:
        self._memory = self._kept = _memory(0)
        # Weak: a batch that the layout gives up between two steps must not keep its states alive.
        self._places: WeakKeyDictionary[Batch, int] = WeakKeyDictionary()

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Decide which gradients are kept in a step over some batches."""
        self._places = WeakKeyDictionary()
        kept = end = 0
        if all(batch.numel() <= LARGEST_STACK for batch in batches):
            for batch in batches:
                size = batch.numel()
                if kept + size <= _LARGEST_KEPT:
                    kept += size
                    self._places[batch] = end
                    end += size if batch.params[0].device.type == "cpu" else 0
        if self._kept.numel() < end or end == 0:
            self._kept = _memory(0)  # Free before there is more.
            self._kept = _memory(end)

    def keeps(self, batch: Batch) -> bool:
        """Whether the gradients of a batch are kept until the step ends."""
        return batch in self._places

    def lend(self, batch: Batch) -> Work:
        """Memory for a batch, until the next call."""
        size = batch.numel()
        if batch.params[0].device.type != "cpu":
            return Work()
        if size > LARGEST_STACK:  # A single tensor, which needs what may be used at once for itself.
            self._memory = _memory(0)
            return Work()
        keep_freed_memory()
        shape = (len(batch), batch.rows, batch.columns)
        if self._memory.numel() < 4 * size:
            self._memory = _memory(0)  # Free before there is more.
            self._memory = _memory(4 * size)
        first, weights, scaled, scratch = self._memory[: 4 * size].view(4, *shape).unbind()
        if batch not in self._places:
            return Work(first, weights, weights, scaled, scratch)
        start = self._places[batch]
        return Work(self._kept[start : start + size].view(shape), first, weights, scaled, scratch)


@cache
def keep_freed_memory() -> None:
    """Let this process keep freed memory, up to 256 MiB, in place of new pages: for what is not lent on a CPU.

    Compiled graphs and 8-bit codes take less time with it. Only glibc has to be told.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


def _memory(count: int) -> Tensor:
    # Said in full: users may have set another default dtype or device.
    return torch.empty(count, dtype=torch.float32, device="cpu")

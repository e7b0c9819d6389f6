"""Working memory of a step, kept between steps where that is faster than asking for it anew."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import LARGEST_STACK, Batch


class Work(NamedTuple):
    """Memory for one stack, each (tensors, rows, columns) float32; None where it is to be allocated when needed.

    Attributes:
        gradients: for the gradients.
        weights: for the weights.
        scaled: for the scaled gradient, and the update that it becomes.
        scratch: for whatever lies in between.
        drive: for what moves the momentum, where that is not the scaled gradient.
    """

    gradients: Tensor | None = None
    weights: Tensor | None = None
    scaled: Tensor | None = None
    scratch: Tensor | None = None
    drive: Tensor | None = None


class Workspace:
    """Lends the same memory to one stack after the other.

    For CPUs: malloc returns blocks of this size to the system and takes them back page by page, which can cost half as
    much again as the arithmetic. PyTorch's allocator for GPUs keeps its blocks, so nothing is held there. Never more
    than four stacks of the largest size that `batches` builds, 100 MiB; five with multi-scale momentum.

    Args:
        stacks: how many stacks to lend, 4 or 5; the fifth is the drive.
    """

    def __init__(self, stacks: int = 4) -> None:
        _let_malloc_keep_blocks()
        self._stacks = stacks
        self._memory = _memory(0)

    def lend(self, batch: Batch) -> Work:
        """Memory for a batch, until the next call."""
        size = batch.numel()
        if batch.params[0].device.type != "cpu" or size > LARGEST_STACK:
            return Work()
        total = self._stacks * size
        if self._memory.numel() < total:
            self._memory = _memory(total)
        return Work(*self._memory[:total].view(self._stacks, -1, batch.rows, batch.columns).unbind())


@cache
def _let_malloc_keep_blocks() -> None:
    """For what is not lent: compiled graphs and 8-bit codes take a quarter less time where no page is new.

    glibc gives larger blocks back to the system as soon as they are free, until one of up to 32 MiB has been: from then
    on it keeps blocks of up to that size. This one is never written to, so that no memory is used for it.
    """
    _memory(31 * 2**18)


def _memory(count: int) -> Tensor:
    # Said in full: users may have set another default dtype or device.
    return torch.empty(count, dtype=torch.float32, device="cpu")

"""Working memory of a step, kept between steps where that is faster than asking for it anew."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import LARGEST_STACK, Batch

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Work(NamedTuple):
    """Memory for one stack, each (tensors, rows, columns) float32; None where it is to be allocated when needed.

    Attributes:
        gradients: for the gradients.
        weights: for the weights, and before they are gathered for what drives the momentum.
        scaled: for the scaled gradient, and the update that it becomes.
        scratch: for whatever lies in between.
    """

    gradients: Tensor | None = None
    weights: Tensor | None = None
    scaled: Tensor | None = None
    scratch: Tensor | None = None


class Workspace:
    """Lends the same memory to one stack after the other.

    For CPUs: malloc returns blocks of this size to the system and takes them back page by page, which can cost half as
    much again as the arithmetic. PyTorch's allocator for GPUs keeps its blocks, so nothing is held there. Never more
    than four stacks of the largest size that `batches` builds, 100 MiB.
    """

    def __init__(self) -> None:
        self._memory = _memory(0)

    def lend(self, batch: Batch) -> Work:
        """Memory for a batch, until the next call."""
        size = batch.numel()
        if batch.params[0].device.type != "cpu":
            return Work()
        if size > LARGEST_STACK:  # A single tensor, which needs what may be used at once for itself.
            self._memory = _memory(0)
            return Work()
        keep_freed_memory()
        total = len(Work._fields) * size
        if self._memory.numel() < total:
            self._memory = _memory(total)
        return Work(*self._memory[:total].view(-1, len(batch), batch.rows, batch.columns).unbind())


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

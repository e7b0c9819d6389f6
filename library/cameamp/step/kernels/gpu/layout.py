"""How tensors are cut into parts, a program each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """Parts of some rows of a table.

    Attributes:
        work: for each program its row and which of the row's parts it is, (programs, 2) int32.
        firsts: for each row of the table, and one past the last, the number of parts before it, int32.
        count: parts of all rows.
    """

    work: Tensor
    firsts: Tensor
    count: int

    @classmethod
    def of(cls, counts: numpy.ndarray, device: torch.device) -> Parts:
        """Parts of a table's rows.

        Args:
            counts: how many parts each row has; 0 for rows that are left out.
            device: where the kernels run.
        """
        firsts = numpy.zeros(len(counts) + 1, dtype=numpy.int32)
        numpy.cumsum(counts, out=firsts[1:])
        rows = numpy.repeat(numpy.arange(len(counts), dtype=numpy.int32), counts)
        numbers = numpy.arange(len(rows), dtype=numpy.int32) - firsts[rows]
        work = numpy.stack([rows, numbers], axis=1)
        return cls(uploaded(work, device), uploaded(firsts, device), len(rows))


def uploaded(array: numpy.ndarray, device: torch.device) -> Tensor:
    """An array on a device, without waiting for it; on a CPU it is the array itself."""
    tensor = torch.from_numpy(numpy.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

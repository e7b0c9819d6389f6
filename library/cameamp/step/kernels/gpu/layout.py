"""How tensors are cut into parts, a program each."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from .launching import Launcher

# A layout of parts is kept for so many combinations of tensors and what is done to them.
_MOST_LAYOUTS = 64


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


class Layouts(Launcher):
    """Launches kernels, and keeps what is the same from step to step: how tensors are cut, and tables on the device."""

    def __init__(self) -> None:
        super().__init__()
        self._layouts: dict[Hashable, tuple[numpy.ndarray, Any]] = {}
        self._uploads: dict[Hashable, tuple[numpy.ndarray, Tensor]] = {}

    def layout(self, key: Hashable, counts: numpy.ndarray, build: Callable[[numpy.ndarray], Any]) -> Any:
        """What `build` makes of counts; kept under `key` as long as these are the counts."""
        known = self._layouts.get(key)
        if known is None or not numpy.array_equal(known[0], counts):
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = known = (counts, build(counts))
        return known[1]

    def upload(self, name: Hashable, table: numpy.ndarray, device: torch.device) -> Tensor:
        """A table on a device; if it is that of the step before, so is the copy."""
        known = self._uploads.get(name)
        if known is None or known[1].device != device or not numpy.array_equal(known[0], table):
            self._uploads[name] = known = (table, uploaded(table, device))
        return known[1]


def uploaded(array: numpy.ndarray, device: torch.device) -> Tensor:
    """An array on a device, without waiting for it; on a CPU it is the array itself."""
    tensor = torch.from_numpy(numpy.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

"""A step of some tensors pass after pass, each of which all threads share."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy

from . import passes
from .settings import Settings
from .threads import spread

# A part of a tensor has so many elements at least, and there are so many parts at most ...
_SMALLEST_PART = 64 * 1024
_MOST_PARTS = 16
# ... of which all but the last are whole blocks of any code.
_UNIT = 4096

_f = numpy.float32


class Totals(NamedTuple):
    """What a pass has summed over each tensor.

    Attributes:
        sums: (tensors, some): the columns that `passes` names, float64.
        columns: (tensors, 2, columns), float32, of the pass over columns: of the momentum, and of what drives it.
    """

    sums: numpy.ndarray
    columns: numpy.ndarray


class CutStep:
    """A step of tensors of one shape. Of its passes only the last one writes; momenta of low rank follow early.

    Args:
        rows: of `table.ROW`, one for each tensor.
        momenta: (tensors, periods) of `table.MOMENTUM`.
        factors: (tensors, some) of `momenta.FACTOR`.
        settings: of all of them.
        facts: (tensors, passes.FACTS), with the strengths of their decay.

    Attributes:
        stages: its passes in their order, each of which is taken and then concluded.
    """

    def __init__(
        self,
        rows: numpy.ndarray,
        momenta: numpy.ndarray,
        factors: numpy.ndarray,
        settings: Settings,
        facts: numpy.ndarray,
    ) -> None:
        k, first = settings.record[0], rows[0]
        numel, span, periods = int(first["numel"]), int(first["span"]), momenta.shape[1]
        driven = periods if k["driven"] else 0
        self.stages = passes.stages(k["early"], k["cautious"], k["row_scaled"], bool(driven and span))
        self._settings = settings
        self._block = int(first["block"])
        self._columns = int(first["columns"])
        is_shard = first["whole_numel"] != numel or span > 0
        self._parts = parts(rows["numel"], self._columns if is_shard else 1)
        self._tensors = rows, momenta, factors
        self._facts = facts
        self._spacings = numpy.zeros((len(rows), max(numel // span if span else 1, 1), periods))
        self._norms = numpy.empty((len(rows), self._columns if k["early"] else 0), dtype=_f)
        self._row_factors = numpy.empty((len(rows), first["rows"]), dtype=_f)
        # Signs and four-bit levels share bytes with distant elements, so they are first written a byte each; not those
        # of shards, whose parts are whole rows.
        apart = not is_shard and len(self._parts) > len(rows)
        self._signs = numpy.empty((len(rows), numel if apart and k["warmup"] else 0), dtype=numpy.uint8)
        self._levels = numpy.empty((len(rows), driven if apart else 0, numel), dtype=numpy.int8)
        self._unpacked = numpy.zeros((len(rows), 2), dtype=numpy.int64)
        for place, room in enumerate((self._signs, self._levels)):
            if room.size:
                self._unpacked[:, place] = room.ctypes.data + room.strides[0] * numpy.arange(len(rows))

    def take(self, stage: int) -> Totals:
        """Take one of the passes."""
        rows, momenta, factors = self._tensors
        count = len(self._parts)
        sums = numpy.zeros((count, passes.PRODUCTS + 2 * momenta.shape[1]))
        columns = numpy.zeros((count, 2, self._columns if stage == passes.COLUMN_NORMS else 0), dtype=_f)
        arguments = (
            rows,
            momenta,
            factors,
            self._settings.record,
            self._facts,
            self._spacings,
            sums,
            columns,
            self._norms,
            self._row_factors,
            self._unpacked,
        )
        if count:
            take = partial(_take_pass, stage, self._parts, arguments, self._block)
            spread(take, self._parts[:, 2] - self._parts[:, 1])
        totals = Totals(numpy.zeros((len(rows), *sums.shape[1:])), numpy.zeros((len(rows), *columns.shape[1:]), _f))
        for total, of_parts in zip(totals, (sums, columns)):
            numpy.add.at(total, self._parts[:, 0], of_parts)  # In their order.
        return totals

    def conclude(self, stage: int, totals: Totals) -> None:
        """Take in what a pass has summed over whole tensors."""
        rows, momenta, _ = self._tensors
        rooms, _ = memory(self._block)
        record = self._settings.record
        passes.conclude(
            stage, rows, momenta, record, self._facts, self._spacings, *totals, self._norms, self._unpacked, rooms
        )


def _take_pass(stage: int, cut: numpy.ndarray, arguments: tuple[Any, ...], block: int, first: int, last: int) -> None:
    passes.step_parts(stage, cut, first, last, *(*arguments, *memory(block)))


def memory(block: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """What one thread computes in, where a code's blocks are at most so long: float32 numbers, and bytes."""
    length = max(passes.SHORT, block)
    return numpy.empty((passes.ROOMS, length), dtype=_f), numpy.empty((2, length), dtype=numpy.uint8)


def parts(sizes: numpy.ndarray, columns: int = 1) -> numpy.ndarray:
    """Cut tensors into parts, the same whatever the number of threads: (parts, 3), tensor, first element, end.

    Args:
        sizes: elements of each.
        columns: of how many elements the parts are a multiple, besides of blocks; of 1 for any.
    """
    return _parts_of(tuple(sizes.tolist()), columns)


@lru_cache(maxsize=64)
def _parts_of(sizes: tuple[int, ...], columns: int) -> numpy.ndarray:
    unit = -(-_UNIT // columns) * columns
    cut = []
    for tensor, size in enumerate(sizes):
        length = -(-max(-(-size // _MOST_PARTS), _SMALLEST_PART) // unit) * unit
        cut += [(tensor, start, min(start + length, size)) for start in range(0, size, length)]
    return numpy.array(cut, dtype=numpy.int64).reshape(-1, 3)

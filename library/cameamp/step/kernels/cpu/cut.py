"""A step of some tensors pass after pass, each of which all threads share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy

from ..table import FOUR_BITS
from . import passes
from .momenta import FACTOR
from .settings import Settings
from .threads import spread

# A part of a tensor has so many elements at least, and there are so many parts at most ...
_SMALLEST_PART = 64 * 1024
_MOST_PARTS = 16
# ... of which all but the last are whole blocks of any code of whole tensors.
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
    """A step of tensors with equally many columns, or of shards of one shape.

    Of its passes only the last one writes; momenta of low rank follow early, those of whole tensors.

    Args:
        rows: of `table.ROW`, one for each tensor.
        momenta: (tensors, periods) of `table.MOMENTUM`.
        factors: (tensors, some) of `momenta.FACTOR`.
        settings: of all of them.
        facts: (tensors, passes.FACTS), with the strengths of their decay.
        spacings: from `conclude_scaled`, with which the pass `passes.SCALED` is over; None if the step begins with it.

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
        spacings: numpy.ndarray | None = None,
    ) -> None:
        k, first = settings.record[0], rows[0]
        stages = passes.stages(k["early"], k["cautious"], k["row_scaled"])
        self.stages = stages if spacings is None else stages[1:]
        self._settings = settings
        self._block = int(rows["block"].max())
        self._columns = int(first["columns"])
        self._parts = parts(rows["numel"], self._block or 1)
        self._tensors = rows, momenta, factors
        self._facts = facts
        self._spacings = numpy.zeros(momenta.shape) if spacings is None else spacings
        self._norms = numpy.empty((len(rows), self._columns if k["early"] else 0), dtype=_f)
        self._row_factors = numpy.empty((len(rows), rows["rows"].max()), dtype=_f)
        self._is_apart = len(self._parts) > len(rows)
        self._unpacked = numpy.zeros((len(rows), 2), dtype=numpy.int64)

    def take(self, stage: int, shown: numpy.ndarray | None = None) -> Totals:
        """Take one of the passes.

        Args:
            stage: which.
            shown: memory for the scaled gradients, (tensors, elements), if somebody wants to see them.
        """
        if stage == passes.WRITTEN and self._is_apart:
            self._make_room()
        rows, momenta, factors = self._tensors
        count = len(self._parts)
        sums = no_sums(count, momenta)
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
            _places_of(shown, len(rows)),
        )
        _take_pass(stage, self._parts, arguments, self._block)
        totals = Totals(no_sums(len(rows), momenta), numpy.zeros((len(rows), *columns.shape[1:]), dtype=_f))
        for total, of_parts in zip(totals, (sums, columns)):
            numpy.add.at(total, self._parts[:, 0], of_parts)  # In their order.
        return totals

    def _make_room(self) -> None:
        """Signs and four-bit levels share bytes with distant elements, so they are first written a byte each."""
        rows, momenta, _ = self._tensors
        k, numel = self._settings.record[0], rows["numel"]
        coded = numpy.count_nonzero(momenta["kind"] == FOUR_BITS, axis=1).max(initial=0) if k["driven"] else 0
        starts = numpy.cumsum(numel) - numel
        self._rooms = [numpy.empty(many * int(numel.sum()), dtype=numpy.uint8) for many in (int(k["warmup"]), coded)]
        for place, (room, many) in enumerate(zip(self._rooms, (1, coded))):
            if room.size:
                self._unpacked[:, place] = room.ctypes.data + many * starts

    def conclude(self, stage: int, totals: Totals) -> None:
        """Take in what a pass has summed over whole tensors."""
        rows, momenta, _ = self._tensors
        of_tensors = (self._facts, self._spacings, *totals, self._norms, self._unpacked)
        _conclude(stage, rows, momenta, self._settings, of_tensors)


def sum_scaled(
    stage: int, rows: numpy.ndarray, momenta: numpy.ndarray, settings: Settings
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The pass `passes.SCALED` over tensors of any shapes, or `passes.MEASURED`, which is that of `passes.measure` too.

    Args:
        stage: which of the two.
        rows, momenta: as of `CutStep`.
        settings: of all of them; of the pass `passes.MEASURED` with an infinite sum of AGR, and an address for the
            context's sample of gradients in place of that of scaled ones.

    Returns:
        What `passes.measure` finds of each of `parts`, or zeros; and the sums of the pass, (tensors, some).
    """
    cut, count = parts(rows["numel"]), len(rows)
    sums, totals = no_sums(len(cut), momenta), no_sums(count, momenta)
    nothing = numpy.zeros((count, 0), dtype=_f)
    arguments = (
        rows,
        momenta,
        numpy.zeros((count, 0), dtype=FACTOR),
        settings.record,
        numpy.zeros((count, passes.FACTS)),
        numpy.zeros(momenta.shape),
        sums,
        numpy.zeros((len(cut), 2, 0), dtype=_f),
        nothing,
        nothing,
        numpy.zeros((count, 2), dtype=numpy.int64),
        _places_of(None, count),
    )
    _take_pass(stage, cut, arguments, int(rows["block"].max(initial=0)))
    numpy.add.at(totals, cut[:, 0], sums)
    return sums[:, passes.FOUND : passes.PRODUCTS], totals


def conclude_scaled(
    rows: numpy.ndarray, momenta: numpy.ndarray, settings: Settings, facts: numpy.ndarray, sums: numpy.ndarray
) -> numpy.ndarray:
    """Take in the sums of the pass `passes.SCALED`; returns the distances between the levels of new momenta."""
    count = len(rows)
    spacings, nothing = numpy.zeros(momenta.shape), numpy.zeros((count, 0), dtype=_f)
    of_tensors = (facts, spacings, sums, numpy.zeros((count, 2, 0), _f), nothing, numpy.zeros((count, 2), numpy.int64))
    _conclude(passes.SCALED, rows, momenta, settings, of_tensors)
    return spacings


def _places_of(memory: numpy.ndarray | None, count: int) -> numpy.ndarray:
    """The address of each of so many rows of memory; zeros for none."""
    if memory is None:
        return numpy.zeros(count, dtype=numpy.int64)
    return memory.ctypes.data + memory.strides[0] * numpy.arange(count)


def _conclude(
    stage: int, rows: numpy.ndarray, momenta: numpy.ndarray, settings: Settings, of_tensors: Sequence[numpy.ndarray]
) -> None:
    """What follows from the sums of a pass, tensors on all threads; the rest is the arguments of `passes.conclude`."""
    block = int(rows["block"].max(initial=0))

    def conclude(first: int, last: int) -> None:
        own = [each[first:last] for each in of_tensors]
        rooms, _ = memory(block)
        passes.conclude(stage, rows[first:last], momenta[first:last], settings.record, *(*own, rooms))

    if len(rows):
        spread(conclude, rows["numel"])


def no_sums(count: int, momenta: numpy.ndarray) -> numpy.ndarray:
    """Zeros in the columns that `passes` names, for so many tensors or parts with these momenta."""
    return numpy.zeros((count, passes.PRODUCTS + 2 * momenta.shape[1]))


def _take_pass(stage: int, cut: numpy.ndarray, arguments: tuple[Any, ...], block: int) -> None:
    """Take a pass over some parts on all threads; arguments as of `passes.step_parts`."""

    def take(first: int, last: int) -> None:
        passes.step_parts(stage, cut, first, last, *(*arguments, *memory(block)))

    if len(cut):
        spread(take, cut[:, 2] - cut[:, 1])


def memory(block: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """What one thread computes in, where a code's blocks are at most so long: float32 numbers, and bytes."""
    length = max(passes.SHORT, block)
    return numpy.empty((passes.ROOMS, length), dtype=_f), numpy.empty((2, length), dtype=numpy.uint8)


def parts(sizes: numpy.ndarray, block: int = 1) -> numpy.ndarray:
    """Cut tensors into parts, the same whatever the number of threads: (parts, 3), tensor, first element, end.

    Args:
        sizes: elements of each.
        block: of how many elements the parts are a multiple.
    """
    return _parts_of(tuple(sizes.tolist()), block)


@lru_cache(maxsize=64)
def _parts_of(sizes: tuple[int, ...], block: int) -> numpy.ndarray:
    unit = -(-_UNIT // block) * block
    cut = []
    for tensor, size in enumerate(sizes):
        length = -(-max(-(-size // _MOST_PARTS), _SMALLEST_PART) // unit) * unit
        cut += [(tensor, start, min(start + length, size)) for start in range(0, size, length)]
    return numpy.array(cut, dtype=numpy.int64).reshape(-1, 3)

"""A step of a group by kernels: the same two methods as `step.passes.Passes` has, which the rules take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy
import torch
from torch import Tensor

from ....groups import Group, States
from ....stacks.stack import Stack
from ...measure import FirstPass, GroupSums, Magnitudes
from ...passes import Measured
from ...rules import Techniques, Watched
from .. import table as fields
from ..check import TakeStep, difference
from ..table import MOMENTUM, ROW, Batch, Tables, with_gradients
from . import passes
from .momenta import factors_of
from .settings import Settings
from .threads import spread

# A tensor of more elements is cut into parts, which several threads share; ...
_LARGEST_WHOLE = 256 * 1024
# ... so many at most, of so many elements at least, and all but the last of whole blocks of any code.
_MOST_PARTS = 16
_SMALLEST_PART = 64 * 1024
_UNIT = 4096

_f = numpy.float32

# No addresses: a thread that has a whole tensor packs what it writes.
_PACKED = numpy.zeros(2, dtype=numpy.int64)


@dataclass
class _Work:
    """A batch in the course of a step.

    Attributes:
        batch: its stacks.
        rows: of `table.ROW`, with the addresses of this step's gradients and weights.
        momenta: (tensors, periods) of `table.MOMENTUM`.
        factors: of the momenta of low rank, (tensors, some) of `momenta.FACTOR`.
        written_back: weights that a kernel works on as copies, each beside its copy.
        gradients: those that are copies, which must outlive the step.
    """

    batch: Batch
    rows: numpy.ndarray
    momenta: numpy.ndarray
    factors: numpy.ndarray
    written_back: list[tuple[Tensor, Tensor]]
    gradients: list[Tensor]

    @classmethod
    def of(cls, batch: Batch, places: numpy.ndarray) -> _Work:
        """Look at the gradients and weights of a batch as they are now; `places` as of `CpuPasses`."""
        table, written_back, gradients = with_gradients(batch)
        if len(places):
            table[:, fields.SAMPLE] = places[table[:, fields.POSITION]]
        momenta = _records(batch.momenta, MOMENTUM)
        return cls(
            batch,
            _records(table, ROW),
            momenta,
            factors_of(momenta),
            written_back,
            gradients,
        )


class CpuKernels:
    """The kernels of CPUs, with what is known of an optimizer's stacks from step to step."""

    def __init__(self) -> None:
        self._tables = Tables()

    def at_step(self, states: States, watch_every: int, watch_places: Sequence[int]) -> CpuPasses:
        """What takes the steps of groups now; see `CpuPasses`."""
        return CpuPasses(states, self._tables, watch_every, _LARGEST_WHOLE, watch_places)

    def difference(self, measured: Measured, states: States, multiplier: Tensor | None, techniques: Techniques) -> str:
        """How a step of some tensors, whole and, if there are larger ones, cut, differs from the rules."""

        def taker(largest_whole: int) -> TakeStep:
            def take_step(copy: Measured, own: States) -> None:
                kernels = CpuPasses(own, Tables(), 0, largest_whole)
                kernels.prepare(copy.group, copy.stacks)
                kernels.update(copy, multiplier)

            return take_step

        takers = [taker(_LARGEST_WHOLE)]
        if any(stack.rows * stack.columns > _LARGEST_WHOLE for stack in measured.stacks):
            takers.append(taker(0))  # Not otherwise: it takes seconds to compile.
        return difference(measured, states, multiplier, techniques, takers)


class CpuPasses:
    """What the groups of an optimizer share in one step.

    Args:
        states: the optimizer's.
        tables: what is known of the stacks.
        watch_every: distance between the elements that the context sees of each tensor; 0 without a context.
        largest_whole: tensors of more elements are cut.
        watch_places: for each parameter, and one past the last, where its elements begin among all that it sees.
    """

    def __init__(
        self, states: States, tables: Tables, watch_every: int, largest_whole: int, watch_places: Sequence[int] = ()
    ) -> None:
        self._states = states
        self._tables = tables
        self._every = watch_every
        self._largest_whole = largest_whole
        self._places = numpy.array(watch_places, dtype=numpy.int64)
        # What the context sees of all groups: gradients, scaled gradients and changes; 0 where nobody takes a step.
        self._samples = numpy.zeros((3, watch_places[-1] if watch_every else 0), dtype=_f)
        self._seen = [torch.from_numpy(sample) for sample in self._samples]
        self._work: dict[Group, list[_Work]] = {}

    def prepare(self, group: Group, stacks: list[Stack]) -> None:
        """Find the tensors of some stacks."""
        for stack in stacks:
            group.bind(stack, self._states)
        batches = self._tables.batches(stacks, group.periods)
        self._work[group] = [_Work.of(batch, self._places) for batch in batches]

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of the stacks that take the step."""
        self.prepare(group, stacks)
        decays = group.config.weight_decay > 0 and any(group.phase(stack).early for stack in stacks)
        found: dict[Stack, FirstPass] = {}
        for work in self._work[group]:
            found.update(zip(work.batch.stacks, self._measure(work, decays)))
        in_order = [found[stack] for stack in stacks]
        magnitudes = [each.magnitudes for each in in_order]
        watched = [each.watched for each in in_order if each.watched is not None]
        return Measured(
            group,
            stacks,
            GroupSums.of(stacks, magnitudes),
            [each.unusable for each in in_order],
            watched,
            [None] * len(stacks),
            magnitudes=magnitudes,
            by_numba=True,
        )

    def update(self, measured: Measured, multiplier: Tensor | None) -> list[Watched]:
        """Second pass: new states and weights.

        Args:
            measured: what the first pass found.
            multiplier: 0-d factor of all learning rates; None if no context drives the optimizer.

        Returns:
            What the context sees of each stack; nothing without a context.
        """
        for work in self._work.pop(measured.group):
            self._update(work, measured, multiplier)
        return [Watched(*self._seen[1:])] * len(measured.stacks) if self._every else []

    def _measure(self, work: _Work, decays: bool) -> Iterator[FirstPass]:
        """What is found of each stack."""
        rows, parts = work.rows, _parts(work.rows["numel"])
        found = numpy.empty((len(parts), 4))

        def measure(first: int, last: int) -> None:
            rooms = numpy.empty((passes.ROOMS, passes.SHORT), dtype=_f)
            passes.measure(parts, first, last, rows, decays, self._every, found, self._samples[0].ctypes.data, rooms)

        spread(measure, parts[:, 2] - parts[:, 1])
        totals = numpy.zeros((len(rows), 4))
        passes.total_measures(parts, found, totals)
        with numpy.errstate(all="ignore"):  # What float32 has no number for is infinite, or 0.
            abs_sums, deviations = (torch.from_numpy(totals[:, column].astype(_f)) for column in (0, 3))
        lengths = [len(stack) for stack in work.batch.stacks]
        starts = numpy.cumsum([0, *lengths[:-1]])
        counts = torch.from_numpy(numpy.add.reduceat(totals[:, 1:3].astype(numpy.int64), starts))
        for own_sums, nonzero, unusable, spreads in zip(
            abs_sums.split(lengths), *counts.T.unbind(), deviations.split(lengths)
        ):
            magnitudes = Magnitudes(own_sums, nonzero, spreads if decays else None)
            yield FirstPass(magnitudes, unusable, self._seen[0] if self._every else None)

    def _update(self, work: _Work, measured: Measured, multiplier: Tensor | None) -> None:
        strengths = dict(zip(measured.stacks, measured.sums.decay_strengths))
        own = [strength for stack in work.batch.stacks if (strength := strengths[stack]) is not None]
        settings = Settings(measured.group, work.batch, measured.sums.magnitude, bool(own), multiplier, self._every)
        facts = numpy.zeros((len(work.rows), passes.SPACINGS + work.momenta.shape[1]))
        facts[:, passes.LENGTHENING] = 1.0  # where no pass finds another
        if own:
            facts[:, passes.STRENGTH] = torch.cat(own).numpy()
        settings.show(*self._samples[1:])
        is_whole = work.rows["numel"] <= self._largest_whole
        largest_first = numpy.argsort(-work.rows["numel"], kind="stable")  # so that threads end together
        _step_whole(work, largest_first[is_whole[largest_first]], settings, facts)
        for tensor in numpy.flatnonzero(~is_whole):
            _step_cut(work, int(tensor), settings, facts[tensor])
        for p, new in work.written_back:
            p.copy_(new)


def _step_whole(work: _Work, whole: numpy.ndarray, settings: Settings, facts: numpy.ndarray) -> None:
    """A step of some tensors, each by one thread."""
    rows = work.rows
    width = int((2 * rows["columns"][whole] + rows["rows"][whole]).max(initial=0))
    block = int(rows["block"].max(initial=0))

    def step(first: int, last: int) -> None:
        widths = numpy.empty(width, dtype=_f)
        passes.step_whole(
            whole,
            first,
            last,
            rows,
            work.momenta,
            work.factors,
            settings.record,
            facts,
            _PACKED,
            *_memory(block),
            widths,
        )

    if len(whole):
        spread(step, rows["numel"][whole])


def _step_cut(work: _Work, tensor: int, settings: Settings, facts: numpy.ndarray) -> None:
    """A step of one large tensor, pass after pass, each of which all threads share."""
    row, own, k = work.rows[tensor], work.momenta[tensor], settings.record[0]
    numel, block = int(row["numel"]), int(row["block"])
    parts = _parts(work.rows["numel"][tensor : tensor + 1])
    columns = numpy.zeros((len(parts), 2, row["columns"] if k["early"] else 0), dtype=_f)
    norms = numpy.empty(columns.shape[2], dtype=_f)
    row_factors = numpy.empty(row["rows"], dtype=_f)
    # Signs and four-bit levels share bytes with distant elements, so they are first written a byte each.
    signs = numpy.empty(numel if k["warmup"] else 0, dtype=numpy.uint8)
    levels = numpy.empty((len(own) if k["driven"] else 0, numel), dtype=numpy.int8)
    unpacked = numpy.array([signs.ctypes.data if k["warmup"] else 0, levels.ctypes.data if k["driven"] else 0])
    for stage in passes.stages(k["early"], k["cautious"], k["row_scaled"]):
        sums = numpy.zeros((len(parts), passes.PRODUCTS + 2 * len(own)))
        arguments = (
            tensor,
            work.rows,
            work.momenta,
            work.factors,
            settings.record,
            facts,
            sums,
            columns,
            norms,
            row_factors,
            unpacked,
        )
        spread(partial(_take_pass, stage, parts, arguments, block), parts[:, 2] - parts[:, 1])
        passes.conclude(stage, *arguments, *_memory(block))


def _take_pass(stage: int, parts: numpy.ndarray, arguments: tuple[Any, ...], block: int, first: int, last: int) -> None:
    passes.step_parts(stage, parts, first, last, *(*arguments, *_memory(block)))


def _memory(block: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """What one thread computes in, where a code's blocks are at most so long: float32 numbers, and bytes."""
    length = max(passes.SHORT, block)
    return numpy.empty((passes.ROOMS, length), dtype=_f), numpy.empty((2, length), dtype=numpy.uint8)


def _records(table: numpy.ndarray, kind: numpy.dtype) -> numpy.ndarray:
    """A table as records, in place of its last dimension."""
    return numpy.ascontiguousarray(table).view(kind).reshape(table.shape[:-1])


def _parts(sizes: numpy.ndarray) -> numpy.ndarray:
    """Cut tensors into parts, the same whatever the number of threads: (parts, 3), tensor, first element, end."""
    return _parts_of(tuple(sizes.tolist()))


@lru_cache(maxsize=64)
def _parts_of(sizes: tuple[int, ...]) -> numpy.ndarray:
    parts = []
    for tensor, size in enumerate(sizes):
        length = max(-(-size // _MOST_PARTS // _UNIT) * _UNIT, _SMALLEST_PART)
        parts += [(tensor, start, min(start + length, size)) for start in range(0, size, length)]
    return numpy.array(parts, dtype=numpy.int64)

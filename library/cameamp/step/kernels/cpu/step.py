"""A step of a group by kernels: the same two methods as `step.passes.Passes` has, which the rules take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy
import torch
from torch import Tensor

from ....groups import MAGNITUDES, Group, States
from ....sharding import ALONE, WHOLE
from ....stacks.stack import Stack
from ... import shared
from ...measure import FirstPass, GroupSums, Magnitudes
from ...passes import Measured
from ...rules import Techniques, Watched
from ...shared import Asks, Questions
from .. import table as fields
from ..check import TakeStep, difference
from ..table import ROW, Batch, Tables, as_records, with_gradients
from . import passes
from .cut import CutStep, conclude_scaled, memory, no_sums, parts, sum_scaled
from .lanes import LANES
from .momenta import records_of
from .settings import Settings
from .shards import StepOfShards
from .threads import spread

# A tensor of more elements is cut into parts, which several threads share.
_LARGEST_WHOLE = 256 * 1024

# In a group of so many elements a gradient g is hardly ever a share of AGR's sum S that matters. If the sum of squares
# of a tensor is then known to be as exact without AGR's 1 - |g| / S as rounding leaves it, one reading is saved.
_MANY = 8 * 1024 * 1024
_ROUNDING = 1e-6

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
        ahead: of tensors by number, what the first pass has summed for the second, as `cut.sum_scaled` does.
    """

    batch: Batch
    rows: numpy.ndarray
    momenta: numpy.ndarray
    factors: numpy.ndarray
    written_back: list[tuple[Tensor, Tensor]]
    gradients: list[Tensor]
    ahead: dict[int, numpy.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, places: numpy.ndarray) -> _Work:
        """Look at the gradients and weights of a batch as they are now; `places` as of `CpuPasses`."""
        table, written_back, gradients = with_gradients(batch)
        if len(places):
            table[:, fields.SAMPLE] = places[table[:, fields.POSITION]]
        momenta, factors = records_of(batch.located)
        return cls(batch, as_records(table, ROW), momenta, factors, written_back, gradients)


@dataclass
class _Course:
    """A second pass over a batch.

    Attributes:
        settings: those of the step.
        facts: (tensors, passes.FACTS), with the strengths of their decay.
        of_shards: the step itself, if they are shards.
    """

    settings: Settings
    facts: numpy.ndarray
    of_shards: StepOfShards | None = None


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
                answers = shared.answers(kernels.questions(copy, multiplier), ALONE)
                kernels.update(copy._replace(answers=answers), multiplier)

            return take_step

        takers = [taker(_LARGEST_WHOLE)]
        if any(stack.cut is WHOLE and stack.rows * stack.columns > _LARGEST_WHOLE for stack in measured.stacks):
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
        self._courses: dict[Stack, _Course] = {}

    def prepare(self, group: Group, stacks: list[Stack]) -> None:
        """Find the tensors of some stacks."""
        for stack in stacks:
            group.bind(stack, self._states)
        batches = self._tables.batches([stack for stack in stacks if stack.cut is WHOLE], group.periods)
        for stack in stacks:
            if stack.cut is not WHOLE:  # Each by itself, because their tensors go on together.
                batches += self._tables.batches([stack], group.periods)
        self._work[group] = [_Work.of(batch, self._places) for batch in batches]

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of the stacks that take the step."""
        self.prepare(group, stacks)
        decays = group.config.weight_decay > 0 and any(group.phase(stack).early for stack in stacks)
        found: dict[Stack, FirstPass] = {}
        is_large = sum(len(stack) * stack.rows * stack.columns for stack in stacks) >= _MANY
        for work in self._work[group]:
            if is_large and group.config.came and work.batch.stacks[0].cut is WHOLE:
                ahead = numpy.flatnonzero(work.rows["numel"] > self._largest_whole)
            else:
                ahead = numpy.zeros(0, dtype=numpy.int64)
            found.update(zip(work.batch.stacks, self._measure(group, work, decays, ahead)))
        in_order = [found[stack] for stack in stacks]
        magnitudes = [each.magnitudes for each in in_order]
        watched = [each.watched for each in in_order if each.watched is not None]
        return Measured(
            group,
            stacks,
            GroupSums.of(stacks, magnitudes, group.entry.get(MAGNITUDES)),
            [each.unusable for each in in_order],
            watched,
            [None] * len(stacks),
            magnitudes=magnitudes,
            by_numba=True,
        )

    def questions(self, measured: Measured, multiplier: Tensor | None) -> dict[Stack, Questions]:
        """What a step of shards asks before its second pass; see `shared.answers`. Momenta of low rank follow in it."""
        group, found = measured.group, dict[Stack, Questions]()
        for work in self._work[group]:
            stack = work.batch.stacks[0]
            if stack.cut is WHOLE:
                continue
            course = self._begin(work, measured, multiplier)
            step = CutStep(work.rows, work.momenta, work.factors, course.settings, course.facts)
            bound = group.config.clip_threshold if group.config.came else None
            found[stack] = course.of_shards = StepOfShards(
                step, stack, course.settings.scales, bound, Asks.of(group, stack, course.settings.scales)
            )
            self._courses[stack] = course
        return found

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

    def _measure(self, group: Group, work: _Work, decays: bool, ahead: numpy.ndarray) -> Iterator[FirstPass]:
        """What is found of each stack; of some tensors also what the second pass sums first, in `work.ahead`."""
        rows, cut = work.rows, parts(work.rows["numel"])
        found, is_left = numpy.empty((len(cut), 4)), ~numpy.isin(cut[:, 0], ahead)
        if len(ahead):
            settings = Settings(group, work.batch, torch.tensor(math.inf), decays, None, self._every)
            settings.record["decays"] = decays
            settings.show(self._samples[0], self._samples[2])
            found[~is_left], sums = sum_scaled(passes.MEASURED, rows[ahead], work.momenta[ahead], settings)
            work.ahead = dict(zip(ahead.tolist(), sums))
        left = cut[is_left]
        found_of_left = numpy.empty((len(left), 4))

        def measure(first: int, last: int) -> None:
            rooms = numpy.empty((passes.ROOMS, passes.SHORT), dtype=_f)
            sample = self._samples[0].ctypes.data
            passes.measure(left, first, last, rows, decays, self._every, found_of_left, sample, rooms)

        if len(left):
            spread(measure, left[:, 2] - left[:, 1])
        found[is_left] = found_of_left
        totals = numpy.zeros((len(rows), 4))
        passes.total_measures(cut, found, totals)
        with numpy.errstate(all="ignore"):  # What float32 has no number for is infinite, or 0.
            abs_sums, deviations = (torch.from_numpy(totals[:, column].astype(_f)) for column in (0, 3))
        lengths = [len(stack) for stack in work.batch.stacks]
        starts = numpy.cumsum([0, *lengths[:-1]])
        counts = torch.from_numpy(numpy.add.reduceat(totals[:, 1:3].astype(numpy.int64), starts))
        spreads = deviations.split(lengths) if decays else repeat(None)
        for own_sums, nonzero, unusable, spread_of_own in zip(abs_sums.split(lengths), *counts.T.unbind(), spreads):
            magnitudes = Magnitudes(own_sums, nonzero, spread_of_own)
            yield FirstPass(magnitudes, unusable, self._seen[0] if self._every else None)

    def _begin(self, work: _Work, measured: Measured, multiplier: Tensor | None) -> _Course:
        """Begin the second pass over a batch."""
        strengths = dict(zip(measured.stacks, measured.sums.decay_strengths))
        own = [strength for stack in work.batch.stacks if (strength := strengths[stack]) is not None]
        settings = Settings(measured.group, work.batch, measured.sums.magnitude, bool(own), multiplier, self._every)
        facts = numpy.zeros((len(work.rows), passes.FACTS))
        facts[:, passes.LENGTHENING] = 1.0  # where no pass finds another
        if own:
            facts[:, passes.STRENGTH] = torch.cat(own).numpy()
        settings.show(*self._samples[1:])
        return _Course(settings, facts)

    def _update(self, work: _Work, measured: Measured, multiplier: Tensor | None) -> None:
        stack = work.batch.stacks[0]
        course = self._courses.pop(stack, None) or self._begin(work, measured, multiplier)
        if course.of_shards is not None:
            course.of_shards.finish()
        else:
            largest_first = numpy.argsort(-work.rows["numel"], kind="stable")  # so that threads end together
            is_whole = work.rows["numel"][largest_first] <= self._largest_whole
            _step_whole(work, largest_first[is_whole], course)
            _step_cut(work, largest_first[~is_whole], course, measured.sums.magnitude.item())
        for p, new in work.written_back:
            p.copy_(new)


def _step_whole(work: _Work, whole: numpy.ndarray, course: _Course) -> None:
    """A step of some tensors, each by one thread."""
    rows = work.rows
    width = int((2 * rows["columns"][whole] + rows["rows"][whole]).max(initial=0))
    block = int(rows["block"].max(initial=0))
    spacings = numpy.empty(work.momenta.shape)

    def step(first: int, last: int) -> None:
        widths = numpy.empty(width, dtype=_f)
        longest = int(rows["numel"][whole[first:last]].max())
        passes.step_whole(
            whole,
            first,
            last,
            rows,
            work.momenta,
            work.factors,
            course.settings.record,
            course.facts,
            spacings,
            _PACKED,
            *memory(block),
            widths,
            numpy.empty(longest + LANES, dtype=_f),
        )

    if len(whole):
        spread(step, rows["numel"][whole])


def _step_cut(work: _Work, large: numpy.ndarray, course: _Course, total: float) -> None:
    """A step of large tensors, pass after pass, each of which all threads share; `total` is AGR's sum."""
    if not len(large):
        return
    rows, momenta, settings, facts = work.rows[large], work.momenta[large], course.settings, course.facts[large]
    is_summed = numpy.array([tensor in work.ahead and _is_exact(work.ahead[tensor], total) for tensor in large])
    sums = no_sums(len(large), momenta)
    for place in numpy.flatnonzero(is_summed):
        sums[place] = work.ahead[large[place]]
    _, sums[~is_summed] = sum_scaled(passes.SCALED, rows[~is_summed], momenta[~is_summed], settings)
    spacings = conclude_scaled(rows, momenta, settings, facts, sums)
    for run in _runs(rows):
        factors = work.factors[large[run]]
        step = CutStep(rows[run], momenta[run], factors, settings, facts[run], spacings[run])
        for stage in step.stages:
            step.conclude(stage, step.take(stage))


def _runs(rows: numpy.ndarray) -> list[list[int]]:
    """Places of tensors that are stepped together: of equally many columns, and no more elements than the largest has.

    Each pass of each run has all threads wait for the last of them; but what a run needs beside its states is memory.
    """
    most, left = int(rows["numel"].max()), 0
    runs: list[list[int]] = []
    for place in numpy.lexsort((-rows["numel"], rows["columns"])).tolist():
        numel, columns = int(rows["numel"][place]), rows["columns"][place]
        if not runs or numel > left or columns != rows["columns"][runs[-1][0]]:
            runs.append([])
            left = most
        runs[-1].append(place)
        left -= numel
    return runs


def _is_exact(ahead: numpy.ndarray, total: float) -> bool:
    """Whether AGR, of this sum, would change what was summed without it by less than rounding does."""
    return float(ahead[passes.EFFECT]) <= _ROUNDING * total * float(ahead[passes.SQUARE])

"""The two passes of a step over a group, as `step/passes.py` has them, by kernels.

Every launch covers all tensors of the group that have the same traits and formats, whatever their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from ....groups import Group, States
from ....phase import Phase
from ....sharding import ALONE, WHOLE
from ....stacks.stack import Stack, Traits
from ... import shared
from ...measure import GroupSums, Magnitudes
from ...passes import Measured
from ...rules import StepScalars, Techniques, Watched
from .. import table as fields
from ..check import difference
from ..table import Batch, Tables, with_gradients
from . import measuring
from .begun import Begun, Part
from .course import Course, Seen
from .launching import on
from .layout import Layouts, uploaded
from .rules import Rules, numbers_of
from .shards import StepOfShards

# Elements of a program: enough for whole blocks of 8-bit codes, and few enough for the registers.
_SPAN, _CODED_SPAN, _SMALLEST_SPAN = 1024, 4096, 64
_MEASURED_SPAN, _MEASURED_WARPS = 4096, 8

# Partial sums that are added up at a time.
_CHUNK = 128
_GROUP_CHUNK = 1024

_CODED = (fields.SIGNED, fields.ROOT, fields.EVEN)
_ALIGNMENT = 16


class GpuKernels(Layouts):
    """What stays from step to step: tables, and how tensors are cut into parts.

    Attributes:
        tables: those of stacks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables()

    def at_step(self, states: States, watch_every: int, watch_places: Sequence[int]) -> GpuPasses:
        """What takes the steps of groups now; see `GpuPasses`."""
        return GpuPasses(states, self, watch_every, watch_places)

    def difference(self, measured: Measured, states: States, multiplier: Tensor | None, techniques: Techniques) -> str:
        """How a step of some tensors differs from that of the rules, beyond rounding; "" if it does not."""

        def take_step(copy: Measured, own: States) -> None:
            passes = GpuPasses(own, self, 0, ())
            answers = shared.answers(passes.questions(copy, multiplier), ALONE)
            passes.update(copy._replace(answers=answers), multiplier)

        return difference(measured, states, multiplier, techniques, [take_step])


class GpuPasses:
    """What the groups of an optimizer share in one step.

    Args:
        states: the optimizer's.
        kernels: what stays from step to step.
        watch_every: distance between the elements that the context sees of each tensor; 0 without a context.
        watch_places: for each parameter, and one past the last, where its elements begin among all that the context
            sees.
    """

    def __init__(self, states: States, kernels: GpuKernels, watch_every: int, watch_places: Sequence[int]) -> None:
        self._states = states
        self._kernels = kernels
        self._watch_every = watch_every
        self._watch_places = numpy.array(watch_places, dtype=numpy.int64)
        # Of the gradient, the scaled gradient and the step, in whole; parameters without a gradient count as 0.
        self._seen: dict[torch.device, tuple[Tensor, ...]] = {}
        self._begun: dict[Group, Begun] = {}
        self._of_shards: dict[Group, list[StepOfShards]] = {}

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of the stacks that take the step, which are on one device."""
        device = stacks[0].device
        with on(device):
            begun = self._begin(group, stacks)
            self._begun[group] = begun
            sample = self._sample(device)[0]
            found = self._measure(begun, sample)
            magnitudes: list[Magnitudes] = []
            if all(stack.cut is WHOLE for stack in stacks):
                unusable = torch.empty((), dtype=torch.int64, device=device)
                self._measure_group(begun, found, unusable)
                sums = GroupSums(begun.total, _by_stacks(begun, stacks))
            else:
                unusable = found[:, measuring.UNUSABLE].sum().to(torch.int64)
                magnitudes = [_magnitudes(found[begun.rows_of(stack)], len(begun.strengths) > 0) for stack in stacks]
                sums = GroupSums.of(stacks, magnitudes)
        watched = [sample] * len(stacks) if self._watch_every else []
        return Measured(
            group, stacks, sums, [unusable], watched, [None] * len(stacks), self._kernels, magnitudes=magnitudes
        )

    def questions(self, measured: Measured, multiplier: Tensor | None) -> dict[Stack, shared.Questions]:
        """What steps of shards ask before the second pass; see `shared.answers`. Momenta of low rank follow in it."""
        if all(stack.cut is WHOLE for stack in measured.stacks):
            return {}
        begun = self._begin_with(measured)
        found: dict[Stack, shared.Questions] = {}
        steps = []
        with on(begun.device):
            for batch, parts in begun.batches:
                if batch.traits.cut is not WHOLE:
                    courses = self._courses(begun, parts, multiplier)
                    step = StepOfShards(measured.group, begun, courses, batch.stacks)
                    found.update(step.questions())
                    steps.append(step)
        self._of_shards[measured.group] = steps
        # In the order in which every process has them, however its kernels take them together.
        return {stack: found[stack] for stack in measured.stacks if stack in found}

    def update(self, measured: Measured, multiplier: Tensor | None) -> list[Watched]:
        """Second pass: every tensor through the rules, and the weights written.

        Args:
            measured: what the first pass returned.
            multiplier: 0-d factor of all learning rates; None if no context drives the optimizer.

        Returns:
            What the context sees of all tensors, once for each stack; nothing without a context.
        """
        begun = self._begin_with(measured)
        for step in self._of_shards.pop(measured.group, ()):
            step.finish()
        with on(begun.device):
            for batch, parts in begun.batches:
                if batch.traits.cut is WHOLE:
                    for course in self._courses(begun, parts, multiplier):
                        course.take()
        for p, copy in begun.written_back:
            p.copy_(copy)
        del self._begun[measured.group]
        _, sample, changes = self._sample(begun.device)
        return [Watched(sample, changes)] * len(measured.stacks) if self._watch_every else []

    # The first pass ---------------------------------------------------------------------------------------------

    def _begin(self, group: Group, stacks: list[Stack]) -> Begun:
        """Look up where everything is."""
        for stack in stacks:
            group.bind(stack, self._states)
        device, config = stacks[0].device, group.config
        batches = self._batches(group, stacks)
        tables, written_back, kept = zip(*(with_gradients(batch) for batch in batches))
        table = numpy.concatenate(tables)
        ordered = [stack for batch in batches for stack in batch.stacks]
        if self._watch_every:
            table[:, fields.SAMPLE] = self._watch_places[table[:, fields.POSITION]]
        decays = config.weight_decay > 0 and any(group.phase(stack).early for stack in stacks)
        parts = []
        start = 0
        for batch in batches:
            rows = slice(start, start + len(batch.located.table))
            parts.append((batch, self._parts(group, batch, table, rows, decays)))
            start = rows.stop
        return Begun(
            ordered, table, self._kernels.upload(group.number, table, device), parts, _floats((), device),
            _floats(len(table) if decays else 0, device), [pair for pairs in written_back for pair in pairs],
            [grad for grads in kept for grad in grads], self._kernels,
        )  # fmt: skip

    def _batches(self, group: Group, stacks: Sequence[Stack]) -> list[Batch]:
        """The stacks whose tensors a kernel may take together; of shards, those that ask the same."""
        alike: dict[shared.Asks | None, list[Stack]] = {}
        for stack in stacks:
            asks = None
            if stack.cut is not WHOLE:
                asks = shared.Asks.of(group, stack, StepScalars.of(group, stack.traits).scales)
            alike.setdefault(asks, []).append(stack)
        return [batch for own in alike.values() for batch in self._kernels.tables.batches(own, group.periods)]

    def _begin_with(self, measured: Measured) -> Begun:
        """The group as the first pass has left it; or, if that was another's, with what it has found.

        The sums are those of all processes by now.
        """
        group = measured.group
        begun = self._begun.get(group)
        if begun is None or set(begun.stacks) != set(measured.stacks):
            begun = self._begun[group] = self._begin(group, measured.stacks)
        if measured.sums.magnitude is not begun.total:
            strengths = dict(zip(measured.stacks, measured.sums.decay_strengths))
            own = [strength for stack in begun.stacks if (strength := strengths[stack]) is not None]
            begun.total = measured.sums.magnitude
            begun.strengths = torch.cat(own) if own else begun.strengths
        return begun

    def _parts(self, group: Group, batch: Batch, table: numpy.ndarray, rows: slice, decays: bool) -> list[Part]:
        """The tensors of a batch, divided further by formats and alignment."""
        traits, config, device = batch.traits, group.config, batch.stacks[0].device
        scalars = StepScalars.of(group, traits)
        begun = [place for place, scale in enumerate(scalars.scales) if scale.share != 0]
        due = [place for place, which in enumerate(begun) if scalars.scales[which].rate != 0]
        numbers = uploaded(numbers_of(traits.step, config, scalars), device)
        own = table[rows]
        entries = numpy.zeros((len(table), len(begun), fields.MOMENTUM_FIELDS), dtype=numpy.int64)
        entries[rows] = batch.located.momenta[:, begun]
        momenta = self._kernels.upload((group.number, rows.start), entries, device)
        kinds = own[:, fields.STATES :: 3]
        coded = bool(numpy.isin(kinds, _CODED).any())
        aligned = _aligned(own)
        labels = numpy.stack([own[:, fields.GRAD_KIND], own[:, fields.WEIGHT_KIND], aligned], axis=1)
        parts = []
        for label in numpy.unique(labels, axis=0):
            members = numpy.zeros(len(table), dtype=bool)
            members[rows] = (labels == label).all(axis=1)
            rules = _rules(group, traits, label, coded, bool(self._watch_every), decays, len(begun))
            shapes = (
                table[members][:, [fields.ROWS, fields.COLUMNS, fields.SPAN]],
                own[members[rows]][:, fields.STATES :: 3],
            )
            what = entries[members][:, :, [fields.KIND, *range(fields.FOLDED_ROWS, fields.RANK + 1)]]
            lengths, span = _lengths(table, members, rules)
            name = (span, members.tobytes(), *(a.tobytes() for a in (*shapes, what, lengths[members])))
            parts.append(Part(rules, members, lengths, span, numbers, momenta, entries, due, name))
        return parts

    def _measure(self, begun: Begun, sample: Tensor) -> Tensor:
        """What is found of each tensor, (tensors, MEASURES) float64."""
        everything = begun.counts(("all", begun.sizes.tobytes()), -(-begun.sizes // _MEASURED_SPAN))
        decays = len(begun.strengths) > 0
        partials = begun.floats(everything.count * measuring.MEASURES)
        found = begun.floats(len(begun.table), measuring.MEASURES, dtype=torch.float64)
        for part in (part for _, parts in begun.batches for part in parts):
            own = begun.counts((part.name, "measured"), -(-begun.sizes // _MEASURED_SPAN) * part.members)
            rules = Rules(
                part.rules.gradients, part.rules.weights, part.rules.aligned, decays=decays,
                watched=part.rules.watched, sharded=part.rules.sharded,
            )  # fmt: skip
            begun.launch(
                measuring.measure_spans, own.count, begun.on_device, own.work, everything.firsts, partials, sample,
                self._watch_every or 1, SPAN=_MEASURED_SPAN, RULES=rules, warps=_MEASURED_WARPS,
            )  # fmt: skip
        begun.launch(
            measuring.measure_tensor, len(begun.table), begun.on_device, everything.firsts, partials, found,
            SPAN=_MEASURED_SPAN, CHUNK=_CHUNK, DECAYS=decays,
        )  # fmt: skip
        return found

    def _measure_group(self, begun: Begun, found: Tensor, unusable: Tensor) -> None:
        """From what is found of each tensor: AGR's sum, how many elements are unusable, and the strengths of decay."""
        begun.launch(
            measuring.measure_group, 1, begun.on_device, found, len(begun.table), begun.total, unusable,
            begun.strengths, CHUNK=_GROUP_CHUNK, DECAYS=len(begun.strengths) > 0,
        )  # fmt: skip

    # The second pass --------------------------------------------------------------------------------------------

    def _courses(self, begun: Begun, parts: Sequence[Part], multiplier: Tensor | None) -> list[Course]:
        """The parts of a batch, ready to be taken through the rules."""
        factor = begun.total if multiplier is None else multiplier.to(begun.device)
        seen = Seen(self._watch_every, *self._sample(begun.device)[1:])
        return [
            Course(begun, part._replace(rules=part.rules._replace(scaled=multiplier is not None)), factor, seen)
            for part in parts
        ]

    def _sample(self, device: torch.device) -> tuple[Tensor, ...]:
        """What the context sees on a device, to be filled."""
        if device not in self._seen:
            size = int(self._watch_places[-1]) if self._watch_every else 0
            self._seen[device] = torch.zeros(3, size, dtype=torch.float32, device=device).unbind()
        return self._seen[device]


def _rules(
    group: Group, traits: Traits, label: numpy.ndarray, coded: bool, watched: bool, decays: bool, momenta: int
) -> Rules:
    config = group.config
    phase = Phase.at(traits.step, config.warmup_steps)
    return Rules(
        gradients=int(label[0]),
        weights=int(label[1]),
        aligned=bool(label[2]),
        coded=coded,
        early=phase.early,
        warmup=phase.warmup,
        came=config.came,
        cautious=config.cautious,
        bumps=phase.warmup and traits.has_polarity,
        decays=decays,
        row_scaled=traits.row_scaled,
        watched=watched,
        momenta=momenta,
        sharded=traits.cut is not WHOLE,
    )


def _aligned(table: numpy.ndarray) -> numpy.ndarray:
    """For each tensor, whether its size and all its addresses are multiples of 16."""
    columns = [fields.NUMEL, fields.GRAD, fields.WEIGHT]
    addresses = table[:, fields.STATES + fields.ADDRESS :: 3]
    aligned: numpy.ndarray = (table[:, columns] % _ALIGNMENT == 0).all(axis=1) & (addresses % _ALIGNMENT == 0).all(1)
    return aligned


def _lengths(table: numpy.ndarray, members: numpy.ndarray, rules: Rules) -> tuple[numpy.ndarray, int]:
    """How many elements of each tensor a program takes, and the power of two in which it has room for them.

    Blocks of shards begin and end between rows, and a program takes one of them.
    """
    span, blocks = _CODED_SPAN if rules.coded else _SPAN, table[:, fields.BLOCK]
    if not (rules.coded and rules.sharded):
        return numpy.full(len(table), span), span
    largest = int(blocks[members].max())
    span = max(1 << (largest - 1).bit_length(), _SMALLEST_SPAN) if largest else span
    return numpy.where(blocks > 0, blocks, span), span


def _magnitudes(found: Tensor, decays: bool) -> Magnitudes:
    """Of what is found of some tensors, those of a stack."""
    deviations = found[:, measuring.DEVIATIONS].float() if decays else None
    return Magnitudes(found[:, measuring.ABS_SUM].float(), found[:, measuring.NONZERO].sum(), deviations)


def _by_stacks(begun: Begun, stacks: Sequence[Stack]) -> list[Tensor] | list[None]:
    """The strengths of some stacks' tensors."""
    if not len(begun.strengths):
        return [None] * len(stacks)
    return [begun.strengths[begun.rows_of(stack)] for stack in stacks]


def _floats(shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)

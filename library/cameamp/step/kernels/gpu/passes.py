"""The two passes of a step over a group, as `step/passes.py` has them, by kernels.

Every launch covers all tensors of the group that have the same traits and formats, whatever their shapes. All kernels
but the last ones only read; so none waits for another but through what it sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ....groups import Group, States
from ....phase import Phase
from ....stacks.stack import Stack, Traits
from ....storage.blockwise import tables_of
from ...measure import GroupSums
from ...passes import Measured
from ...rules import StepScalars, Techniques, Watched
from ...shared import Questions
from .. import table as fields
from ..check import difference
from ..table import Batch, Tables, with_gradients
from . import low_rank, measuring, moments, writing
from .launching import Launcher, on
from .layout import Parts, uploaded
from .rules import Rules, numbers_of

# Elements of a program, and its warps: enough for whole blocks of 8-bit codes, and few enough for the registers.
_SPAN, _WARPS = 1024, 4
_CODED_SPAN, _CODED_WARPS = 4096, 16
_MEASURED_SPAN, _MEASURED_WARPS = 4096, 8
_PACKED_SPAN = 1024

# Tiles of matrices, rows by columns: where columns are summed up, where rows are, and where thin products are taken.
_COLUMN_TILE = (64, 16)
_ROW_TILE = (16, 64)
_PRODUCT_TILE = (16, 64)

# Partial sums that are added up at a time.
_CHUNK = 128
_GROUP_CHUNK = 1024

_CODED = (fields.SIGNED, fields.ROOT, fields.EVEN)
_ALIGNMENT = 16

# A layout of parts is kept for so many combinations of tensors and what is done to them.
_MOST_LAYOUTS = 64


class _Part(NamedTuple):
    """Tensors of one group that one kernel visits.

    Attributes:
        rules: what kernels are compiled for.
        members: which rows of the group's table, bool.
        numbers: those of the step.
        momenta: the entries of the momenta that have begun, for all rows of the table, on the device.
        entries: the same on the host.
        due: which of these momenta are updated.
        name: what the layouts of these tensors are kept under.
    """

    rules: Rules
    members: numpy.ndarray
    numbers: Tensor
    momenta: Tensor
    entries: numpy.ndarray
    due: list[int]
    name: Hashable


@dataclass
class _Begun:
    """A group between its two passes.

    Attributes:
        table: on the host, and
        on_device: on the device.
        parts: what one kernel visits.
        sizes: element counts.
        total: AGR's sum, 0-d.
        strengths: theta of each tensor.
        stacks: the stacks, in the table's order.
        written_back: weights that were copied, each beside its copy.
        kept: gradients that were copied.
    """

    table: numpy.ndarray
    on_device: Tensor
    parts: list[_Part]
    sizes: numpy.ndarray
    total: Tensor
    strengths: Tensor
    stacks: list[Stack]
    written_back: list[tuple[Tensor, Tensor]]
    kept: list[Tensor]


class GpuKernels(Launcher):
    """What stays from step to step: tables, and how tensors are cut into parts.

    Attributes:
        tables: those of stacks.
    """

    takes_shards = False

    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables()
        self._layouts: dict[Hashable, Any] = {}
        self._uploads: dict[Hashable, tuple[numpy.ndarray, Tensor]] = {}

    def layout(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What `build` returns; kept under `key`."""
        if key not in self._layouts:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = build()
        return self._layouts[key]

    def upload(self, name: Hashable, table: numpy.ndarray, device: torch.device) -> Tensor:
        """A table on a device; if it is that of the step before, so is the copy."""
        known = self._uploads.get(name)
        if known is None or known[1].device != device or not numpy.array_equal(known[0], table):
            self._uploads[name] = known = (table, uploaded(table, device))
        return known[1]

    def at_step(self, states: States, watch_every: int, watch_places: Sequence[int]) -> GpuPasses:
        """What takes the steps of groups now; see `GpuPasses`."""
        return GpuPasses(states, self, watch_every, watch_places)

    def difference(self, measured: Measured, states: States, multiplier: Tensor | None, techniques: Techniques) -> str:
        """How a step of some tensors differs from that of the rules, beyond rounding; "" if it does not."""

        def take_step(copy: Measured, own: States) -> None:
            GpuPasses(own, self, 0, ()).update(copy, multiplier)

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
        self._begun: dict[int, _Begun] = {}

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of the stacks that take the step, which are on one device."""
        device = stacks[0].device
        with on(device):
            begun = self._begin(group, stacks)
            self._begun[group.number] = begun
            unusable = torch.empty((), dtype=torch.int64, device=device)
            sample = self._sample(device)[0]
            self._measure(begun, unusable, sample)
        strengths = _by_stacks(begun.strengths, begun.stacks) if len(begun.strengths) else [None] * len(stacks)
        watched = [sample] * len(stacks) if self._watch_every else []
        sums = GroupSums(begun.total, strengths)
        return Measured(group, begun.stacks, sums, [unusable], watched, [None] * len(stacks), self._kernels)

    def questions(self, measured: Measured, multiplier: Tensor | None) -> dict[Stack, Questions]:
        """None: they take no shards."""
        return {}

    def update(self, measured: Measured, multiplier: Tensor | None) -> list[Watched]:
        """Second pass: every tensor through the rules, and the weights written.

        Args:
            measured: what the first pass returned.
            multiplier: 0-d factor of all learning rates; None if no context drives the optimizer.

        Returns:
            What the context sees of all tensors, once for each stack; nothing without a context.
        """
        begun = self._begun.pop(measured.group.number, None)
        if begun is None or begun.stacks is not measured.stacks:
            begun = self._begin_with(measured)
        device = begun.on_device.device
        factor = begun.total if multiplier is None else multiplier.to(device)
        _, sample, changes = self._sample(device)
        with on(device):
            for part in begun.parts:
                rules = part.rules._replace(scaled=multiplier is not None)
                self._update(begun, part._replace(rules=rules), factor, sample, changes)
        for p, copy in begun.written_back:
            p.copy_(copy)
        return [Watched(sample, changes)] * len(begun.stacks) if self._watch_every else []

    # The first pass ---------------------------------------------------------------------------------------------

    def _begin(self, group: Group, stacks: list[Stack]) -> _Begun:
        """Look up where everything is."""
        for stack in stacks:
            group.bind(stack, self._states)
        device, config = stacks[0].device, group.config
        batches = self._kernels.tables.batches(stacks, group.periods)
        tables, written_back, kept = zip(*(with_gradients(batch) for batch in batches))
        table = numpy.concatenate(tables)
        ordered = [stack for batch in batches for stack in batch.stacks]
        sizes = table[:, fields.NUMEL]
        if self._watch_every:
            table[:, fields.SAMPLE] = self._watch_places[table[:, fields.POSITION]]
        decays = config.weight_decay > 0 and any(group.phase(stack).early for stack in stacks)
        parts = []
        start = 0
        for batch in batches:
            rows = slice(start, start + len(batch.located.table))
            parts += self._parts(group, batch, table, rows, decays)
            start = rows.stop
        return _Begun(
            table, self._kernels.upload(group.number, table, device), parts, sizes, _floats((), device),
            _floats(len(table) if decays else 0, device), ordered,
            [pair for pairs in written_back for pair in pairs], [grad for grads in kept for grad in grads],
        )  # fmt: skip

    def _begin_with(self, measured: Measured) -> _Begun:
        """As `_begin`, for stacks that were measured otherwise."""
        begun = self._begin(measured.group, measured.stacks)
        strengths = [strength for strength in measured.sums.decay_strengths if strength is not None]
        begun.total = measured.sums.magnitude
        begun.strengths = torch.cat(strengths) if strengths else begun.strengths
        return begun

    def _parts(self, group: Group, batch: Batch, table: numpy.ndarray, rows: slice, decays: bool) -> list[_Part]:
        """The tensors of a batch, divided further by formats and alignment."""
        traits, config, device = batch.traits, group.config, batch.stacks[0].device
        scalars = StepScalars.at(traits.step, config, group.scheduler_factor, traits.momentum_counts)
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
            shapes = table[members][:, [fields.ROWS, fields.COLUMNS]], own[members[rows]][:, fields.STATES :: 3]
            what = entries[members][:, :, [fields.KIND, *range(fields.FOLDED_ROWS, fields.RANK + 1)]]
            name = (device, len(table), members.tobytes(), *(a.tobytes() for a in shapes), what.tobytes())
            parts.append(_Part(rules, members, numbers, momenta, entries, due, name))
        return parts

    def _measure(self, begun: _Begun, unusable: Tensor, sample: Tensor) -> None:
        device, launch = begun.on_device.device, self._kernels.launch
        spans = [self._spans(begun, part, _MEASURED_SPAN) for part in begun.parts]
        everything = self._counts(begun, "all", -(-begun.sizes // _MEASURED_SPAN))
        decays = len(begun.strengths) > 0
        partials = _floats(everything.count * measuring.MEASURES, device)
        found = torch.empty(len(begun.table) * measuring.MEASURES, dtype=torch.float64, device=device)
        for part, own in zip(begun.parts, spans):
            rules = Rules(
                part.rules.gradients, part.rules.weights, part.rules.aligned, decays=decays,
                watched=part.rules.watched,
            )  # fmt: skip
            launch(
                measuring.measure_spans, own.count, begun.on_device, own.work, everything.firsts, partials, sample,
                self._watch_every or 1, SPAN=_MEASURED_SPAN, RULES=rules, warps=_MEASURED_WARPS,
            )  # fmt: skip
        launch(
            measuring.measure_tensor, len(begun.table), begun.on_device, everything.firsts, partials, found,
            SPAN=_MEASURED_SPAN, CHUNK=_CHUNK, DECAYS=decays,
        )  # fmt: skip
        launch(
            measuring.measure_group, 1, begun.on_device, found, len(begun.table), begun.total, unusable,
            begun.strengths, CHUNK=_GROUP_CHUNK, DECAYS=decays,
        )  # fmt: skip

    # The second pass --------------------------------------------------------------------------------------------

    def _update(self, begun: _Begun, part: _Part, factor: Tensor, sample: Tensor, changes: Tensor) -> None:
        """All tensors of a part through the rules."""
        table, momenta, rules, numbers = begun.on_device, part.momenta, part.rules, part.numbers
        device, launch = table.device, self._kernels.launch
        span, warps = (_CODED_SPAN, _CODED_WARPS) if rules.coded else (_SPAN, _WARPS)
        maps = maps_of_codes_on(device) if rules.coded else (numbers, table)
        spans = self._spans(begun, part, span)
        tensors = self._counts(begun, (part.name, "tensors"), part.members.astype(numpy.int32))
        sums = _floats(len(begun.table) * (4 + rules.momenta), device)
        common = (begun.total, sums, numbers, maps[0])

        partials = _floats(spans.count * (1 + 2 * rules.momenta), device)
        launch(
            moments.sum_squares, spans.count, table, momenta, spans.work, spans.firsts, begun.total, numbers, maps[0],
            partials, SPAN=span, RULES=rules, warps=warps,
        )  # fmt: skip
        launch(
            moments.clip_tensor, tensors.count, table, momenta, tensors.work, spans.firsts, numbers, partials, sums,
            CHUNK=_CHUNK, RULES=rules,
        )  # fmt: skip
        self._update_low_rank(begun, part, common)

        columns, norms = tensors, numbers
        if rules.early:
            columns, norms = self._column_norms(begun, part, common)
        upto_grams = (table, momenta, spans.work, spans.firsts, columns.firsts, norms, *common)
        if rules.early:
            products = torch.empty(spans.count * 3, dtype=torch.float64, device=device)
            launch(moments.sum_products, spans.count, *upto_grams, products, SPAN=span, RULES=rules, warps=warps)
            launch(
                moments.orthogonal_tensor, tensors.count, table, tensors.work, spans.firsts, numbers, products, sums,
                CHUNK=_CHUNK, RULES=rules,
            )  # fmt: skip
        if rules.cautious:
            agreement = _floats(spans.count, device)
            launch(moments.count_agreement, spans.count, *upto_grams, agreement, SPAN=span, RULES=rules, warps=warps)
            launch(
                moments.agreement_of_tensor, tensors.count, table, tensors.work, spans.firsts, agreement, sums,
                CHUNK=_CHUNK, RULES=rules,
            )  # fmt: skip
        rows, row_factors = self._row_factors(begun, part) if rules.row_scaled else (tensors, numbers)
        keep_levels = self._pack_levels(begun, part, common)
        strengths = begun.strengths if len(begun.strengths) else numbers
        launch(
            writing.write_step, spans.count, table, momenta, spans.work, columns.firsts, norms, rows.firsts,
            row_factors, begun.total, strengths, factor, sums, numbers, *maps, sample, changes,
            self._watch_every or 1, SPAN=span, RULES=rules, warps=warps,
        )  # fmt: skip
        keep_levels()
        self._pack_signs(begun, part)

    def _column_norms(self, begun: _Begun, part: _Part, common: tuple[Any, ...]) -> tuple[Parts, Tensor]:
        """TAM's column norms: for each tensor where its first column is, and the products of both norms."""
        tall, wide = _COLUMN_TILE
        rows, columns = begun.table[:, fields.ROWS], begun.table[:, fields.COLUMNS]
        across = -(-columns // wide) * part.members
        tiles = self._counts(begun, (part.name, "tiles"), -(-rows // tall) * across)
        groups = self._counts(begun, (part.name, "tile columns"), across)
        places = self._counts(begun, (part.name, "columns"), columns * part.members)
        partials = _floats(tiles.count * 2 * wide, begun.on_device.device)
        norms = _floats(places.count, begun.on_device.device)
        self._kernels.launch(
            moments.sum_columns, tiles.count, begun.on_device, part.momenta, tiles.work, tiles.firsts, *common,
            partials, TALL=tall, WIDE=wide, RULES=part.rules,
        )  # fmt: skip
        self._kernels.launch(
            moments.finish_columns, groups.count, begun.on_device, groups.work, tiles.firsts, places.firsts, partials,
            norms, TALL=tall, WIDE=wide, warps=1,
        )  # fmt: skip
        return places, norms

    def _row_factors(self, begun: _Begun, part: _Part) -> tuple[Parts, Tensor]:
        """ALLoRA's factors: for each tensor where its first row is, and the factors."""
        tall, wide = _ROW_TILE
        rows = begun.table[:, fields.ROWS] * part.members
        blocks = self._counts(begun, (part.name, "row blocks"), -(-rows // tall))
        places = self._counts(begun, (part.name, "rows"), rows)
        factors = _floats(places.count, begun.on_device.device)
        self._kernels.launch(
            moments.scale_rows, blocks.count, begun.on_device, blocks.work, places.firsts, part.numbers, factors,
            TALL=tall, WIDE=wide, RULES=part.rules,
        )  # fmt: skip
        return places, factors

    def _update_low_rank(self, begun: _Begun, part: _Part, common: tuple[Any, ...]) -> None:
        """Take the momenta of low rank that are due a step further."""
        is_due = numpy.zeros(part.rules.momenta, dtype=bool)
        is_due[part.due] = True
        entries = part.entries.reshape(-1, fields.MOMENTUM_FIELDS)
        chosen = (part.entries[:, :, fields.KIND] == fields.LOW_RANK) & is_due & part.members[:, None]
        if not chosen.any():
            return
        which = chosen.reshape(-1).astype(numpy.int64)
        name = (part.name, tuple(part.due))
        rows, columns = entries[:, fields.FOLDED_ROWS] * which, entries[:, fields.FOLDED_COLUMNS] * which
        tall, wide = _PRODUCT_TILE
        across = self._counts(begun, (name, "folded rows"), -(-rows // tall))
        down = self._counts(begun, (name, "folded columns"), -(-columns // wide))
        single = self._counts(begun, (name, "entries"), which)
        room = (entries[:, fields.RANK] * (rows + columns) + low_rank.MORE) * which
        places = self._firsts(begun, (name, "room"), room)
        memory = _floats(int(room.sum()), begun.on_device.device)
        launch, rules = self._kernels.launch, part.rules
        every = (begun.on_device, part.momenta)
        tile: dict[str, Any] = {"TALL": tall, "WIDE": wide, "RULES": rules}
        launch(low_rank.look_along_rows, across.count, *every, across.work, places, *common, memory, **tile)
        launch(
            low_rank.make_left, single.count, part.momenta, single.work, places, part.numbers, memory,
            CHUNK=_CHUNK, RULES=rules, warps=1,
        )  # fmt: skip
        launch(low_rank.look_along_columns, down.count, *every, down.work, places, *common, memory, **tile)
        launch(
            low_rank.make_right, single.count, part.momenta, single.work, places, memory, CHUNK=_CHUNK, warps=1
        )  # fmt: skip

    def _pack_levels(self, begun: _Begun, part: _Part, common: tuple[Any, ...]) -> Callable[[], None]:
        """Pack the momenta of four bits that are due; what is returned puts them where they belong."""
        pending = []
        for place in part.due:
            chosen = (part.entries[:, place, fields.KIND] == fields.FOUR_BITS) & part.members
            if not chosen.any():
                continue
            halves = (begun.sizes + 1) // 2 * chosen
            bytes_of = self._counts(begun, (part.name, place, "bytes"), -(-halves // _PACKED_SPAN))
            places = self._firsts(begun, (part.name, place, "halves"), halves)
            packed = torch.empty(int(halves.sum()), dtype=torch.int8, device=begun.on_device.device)
            every = (begun.on_device, part.momenta, bytes_of.work, places)
            constants: dict[str, Any] = {"SPAN": _PACKED_SPAN, "PLACE": place, "RULES": part.rules}
            self._kernels.launch(writing.pack_levels, bytes_of.count, *every, *common, packed, **constants)
            pending.append((bytes_of.count, (*every, common[1], part.numbers, packed), constants))

        def keep() -> None:
            for count, arguments, constants in pending:
                self._kernels.launch(writing.keep_levels, count, *arguments, **constants)

        return keep

    def _pack_signs(self, begun: _Begun, part: _Part) -> None:
        """The signs of this step's gradients, where they have a bit each."""
        kinds = begun.table[:, fields.STATES + 3 * fields.STATE_NUMBERS["last_polarity"] + fields.KIND]
        packed = (kinds == fields.PACKED) & part.members
        if part.rules.warmup and packed.any():
            counts = -(-begun.sizes // (8 * _PACKED_SPAN)) * packed
            bytes_of = self._counts(begun, (part.name, "signs"), counts)
            self._kernels.launch(
                writing.pack_signs, bytes_of.count, begun.on_device, bytes_of.work, begun.total, SPAN=_PACKED_SPAN,
                RULES=part.rules,
            )  # fmt: skip

    # Layouts ----------------------------------------------------------------------------------------------------

    def _spans(self, begun: _Begun, part: _Part, span: int) -> Parts:
        return self._counts(begun, (part.name, span), -(-begun.sizes // span) * part.members)

    def _counts(self, begun: _Begun, name: Hashable, counts: numpy.ndarray) -> Parts:
        """So many parts of each row."""
        device = begun.on_device.device
        key = (name, device, counts.tobytes()) if name == "all" else name
        parts: Parts = self._kernels.layout(key, lambda: Parts.of(counts, device))
        return parts

    def _firsts(self, begun: _Begun, name: Hashable, counts: numpy.ndarray) -> Tensor:
        """Where each row begins in a memory that has so many places for each."""
        device = begun.on_device.device
        firsts: Tensor = self._kernels.layout(name, lambda: uploaded(_before(counts), device))
        return firsts

    def _sample(self, device: torch.device) -> tuple[Tensor, ...]:
        """What the context sees on a device, to be filled."""
        if device not in self._seen:
            size = int(self._watch_places[-1]) if self._watch_every else 0
            self._seen[device] = torch.zeros(3, size, dtype=torch.float32, device=device).unbind()
        return self._seen[device]


@cache
def maps_of_codes_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the signed and the unsigned map with the midpoints of both, and the tables of first codes."""
    signed, unsigned = tables_of(True, device), tables_of(False, device)
    maps = torch.cat([signed.values, unsigned.values, signed.midpoints, unsigned.midpoints])
    return maps, torch.cat([signed.first, unsigned.first])


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
    )


def _aligned(table: numpy.ndarray) -> numpy.ndarray:
    """For each tensor, whether its size and all its addresses are multiples of 16."""
    columns = [fields.NUMEL, fields.GRAD, fields.WEIGHT]
    addresses = table[:, fields.STATES + fields.ADDRESS :: 3]
    aligned: numpy.ndarray = (table[:, columns] % _ALIGNMENT == 0).all(axis=1) & (addresses % _ALIGNMENT == 0).all(1)
    return aligned


def _before(counts: numpy.ndarray) -> numpy.ndarray:
    """The sum of all counts before each, int32."""
    before: numpy.ndarray = (numpy.cumsum(counts) - counts).astype(numpy.int32)
    return before


def _by_stacks(values: Tensor, stacks: list[Stack]) -> list[Tensor]:
    return list(values.split([len(stack) for stack in stacks]))


def _floats(shape: Any, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)

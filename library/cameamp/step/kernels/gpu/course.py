"""The second pass over the tensors of a part, kernel by kernel.

All kernels but the last ones only read; so none waits for another but through what it sums up. Sums are found in
parts, which `conclude_...` adds up: those of this process, or of shards those that all processes have told.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ....storage.blockwise import tables_of
from .. import table as fields
from . import low_rank, moments, writing
from .begun import Begun, Part
from .layout import Parts
from .packing import pack_levels, pack_signs

# What a program has to do decides how many warps it gets.
_ELEMENTS_A_WARP = 256

# Tiles of matrices, rows by columns: where columns are summed up, where rows are, and where thin products are taken.
_COLUMN_TILE = (64, 16)
_ROW_TILE = (16, 64)
_PRODUCT_TILE = (16, 64)

# Partial sums that are added up at a time.
_CHUNK = 128

# How many numbers are summed up of an update: u.p, u.u and p.p.
_PRODUCTS = 3


class Seen(NamedTuple):
    """What the context sees of a step, and how far apart.

    Attributes:
        every: distance between the elements that it sees of each tensor; 0 without a context.
        scaled_grad: of the scaled gradients, in whole; to be filled.
        change: of the steps, likewise.
    """

    every: int
    scaled_grad: Tensor
    change: Tensor


class Sums(NamedTuple):
    """Sums over tensors, in parts.

    Attributes:
        values: (parts of all tensors, numbers), in order.
        firsts: for each row of the table, and one past the last, the number of its first part.
    """

    values: Tensor
    firsts: Tensor


class Columns(NamedTuple):
    """Numbers of the columns of tensors.

    Attributes:
        places: for each row of the table, and one past the last, where its first column is.
        values: (columns of all tensors,).
    """

    places: Tensor
    values: Tensor


class Course:
    """A part on its way through the rules.

    Args:
        begun: the group.
        part: the part; its rules say whether a context multiplies the learning rates.
        factor: what it multiplies them by.
        seen: what it sees.

    Attributes:
        part: the part.
        norms: of the early phase, the products of the norms of momentum and drive.
    """

    def __init__(self, begun: Begun, part: Part, factor: Tensor, seen: Seen) -> None:
        self.part = part
        self._begun = begun
        self._factor = factor
        self._seen = seen
        rules, numbers = part.rules, part.numbers
        self._spans = begun.spans(part)
        self._tensors = begun.counts((part.name, "tensors"), part.members.astype(numpy.int32))
        self._maps = maps_of_codes_on(begun.device) if rules.coded else (numbers, begun.on_device)
        self._common = begun.total, begun.floats(len(begun.table) * (4 + rules.momenta)), numbers, self._maps[0]
        self.norms = Columns(self._tensors.firsts, numbers)  # Later no kernel looks at them.

    def take(self) -> None:
        """The whole course, of tensors that this process has in whole."""
        rules = self.part.rules
        self.conclude_scaled(self.sum_scaled())
        self.update_low_rank()
        if rules.early:
            self.norms = self.column_norms()
            self.conclude_updates(self.sum_updates())
        if rules.cautious:
            self.conclude_agreement(self.sum_agreement())
        self.write()

    # The scaled gradient ----------------------------------------------------------------------------------------

    def sum_scaled(self) -> Sums:
        """Of x = grad / sqrt(v) the sum of squares, and of each momentum m of four bits those of x m and m^2."""
        part, total, numbers = self.part, self._begun.total, self.part.numbers
        found = self._sums_of_spans(1 + 2 * part.rules.momenta)
        self._launch_spans(
            moments.sum_squares, self._begun.on_device, part.momenta, self._spans.work, found.firsts, total, numbers,
            self._maps[0], found.values,
        )  # fmt: skip
        return found

    def show_scaled(self, rows: slice, shown: Tensor) -> None:
        """Put x = grad / sqrt(v) of a stack into (tensors, elements), as far as the stack is in this part."""
        part, begun = self.part, self._begun
        chosen = numpy.zeros(len(begun.table), dtype=bool)
        chosen[rows] = part.members[rows]
        spans = begun.counts((part.name, "of stack", rows.start, rows.stop), -(-begun.sizes // part.lengths) * chosen)
        self._launch_spans(
            moments.show_scaled, begun.on_device, spans.work, rows.start, begun.total, part.numbers, self._maps[0],
            shown, spans=spans,
        )  # fmt: skip

    def conclude_scaled(self, found: Sums) -> None:
        """CAME's bound, and the norms that four bits are scaled by."""
        part, sums = self.part, self._common[1]
        self._launch_tensors(
            moments.clip_tensor, self._begun.on_device, part.momenta, self._tensors.work, found.firsts, part.numbers,
            found.values, sums, RULES=part.rules,
        )  # fmt: skip

    # The update -------------------------------------------------------------------------------------------------

    def column_norms(self) -> Columns:
        """TAM's: the products of the norms of momentum and drive."""
        begun, part = self._begun, self.part
        places = begun.counts((part.name, "columns"), begun.table[:, fields.COLUMNS] * part.members)
        norms = Columns(places.firsts, begun.floats(places.count))
        self._sum_columns(norms, norms, whole=True)
        return norms

    def sum_columns(self, momentum: Columns, drive: Columns) -> None:
        """The sums of squares of the columns of momentum and drive, put where these have their places."""
        self._sum_columns(momentum, drive, whole=False)

    def sum_updates(self) -> Sums:
        """u.p, u.u and p.p of the update and the weights."""
        found = self._sums_of_spans(_PRODUCTS, torch.float64)
        self._launch_spans(moments.sum_products, *self._upto_grams(), found.values)
        return found

    def conclude_updates(self, found: Sums) -> None:
        """The orthogonal gradient."""
        part = self.part
        self._launch_tensors(
            moments.orthogonal_tensor, self._begun.on_device, self._tensors.work, found.firsts, part.numbers,
            found.values, self._common[1], RULES=part.rules,
        )  # fmt: skip

    def sum_agreement(self) -> Sums:
        """How many elements of the update have the gradient's sign."""
        found = self._sums_of_spans(1)
        self._launch_spans(moments.count_agreement, *self._upto_grams(), found.values)
        return found

    def conclude_agreement(self, found: Sums) -> None:
        """Cautious: how much longer what is left of the update gets."""
        self._launch_tensors(
            moments.agreement_of_tensor, self._begun.on_device, self._tensors.work, found.firsts, found.values,
            self._common[1], RULES=self.part.rules,
        )  # fmt: skip

    def write(self) -> None:
        """The last pass: states and weights."""
        begun, part, seen = self._begun, self.part, self._seen
        rows, row_factors = self._row_factors() if part.rules.row_scaled else (self._tensors, part.numbers)
        keep_levels = pack_levels(begun, part, self._common)
        strengths = begun.strengths if len(begun.strengths) else part.numbers
        total, sums, numbers, _ = self._common
        self._launch_spans(
            writing.write_step, begun.on_device, part.momenta, self._spans.work, *self.norms, rows.firsts,
            row_factors, total, strengths, self._factor, sums, numbers, *self._maps, seen.scaled_grad, seen.change,
            seen.every or 1,
        )  # fmt: skip
        keep_levels()
        pack_signs(begun, part)

    # The inside -------------------------------------------------------------------------------------------------

    def _launch_spans(self, kernel: Any, *arguments: Any, spans: Parts | None = None) -> None:
        """A kernel with a program for each span."""
        part, span = self.part, self.part.span
        count = (self._spans if spans is None else spans).count
        warps = max(span // _ELEMENTS_A_WARP, 1)
        self._begun.launch(kernel, count, *arguments, SPAN=span, RULES=part.rules, warps=warps)

    def _launch_tensors(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """A kernel with a program for each tensor."""
        self._begun.launch(kernel, self._tensors.count, *arguments, CHUNK=_CHUNK, **constants)

    def _sums_of_spans(self, width: int, dtype: torch.dtype = torch.float32) -> Sums:
        return Sums(self._begun.floats(self._spans.count, width, dtype=dtype), self._spans.firsts)

    def add_up(self, found: Sums, totals: Tensor) -> None:
        """Put what the parts of each tensor come to into its row of float64 `totals`."""
        self._launch_tensors(
            moments.add_up, self._tensors.work, found.firsts, found.values, totals, WIDTH=totals.shape[1]
        )

    def _upto_grams(self) -> tuple[Any, ...]:
        spans = self._spans
        return (
            self._begun.on_device, self.part.momenta, spans.work, spans.firsts, *self.norms, *self._common,
        )  # fmt: skip

    def _sum_columns(self, first: Columns, second: Columns, whole: bool) -> None:
        begun, part = self._begun, self.part
        tall, wide = _COLUMN_TILE
        across = -(-begun.table[:, fields.COLUMNS] // wide) * part.members
        tiles = begun.counts((part.name, "tiles"), -(-begun.table[:, fields.ROWS] // tall) * across)
        groups = begun.counts((part.name, "tile columns"), across)
        partials = begun.floats(tiles.count * 2 * wide)
        begun.launch(
            moments.sum_columns, tiles.count, begun.on_device, part.momenta, tiles.work, tiles.firsts, *self._common,
            partials, TALL=tall, WIDE=wide, RULES=part.rules,
        )  # fmt: skip
        begun.launch(
            moments.finish_columns, groups.count, begun.on_device, groups.work, tiles.firsts, first.places, partials,
            first.values, second.values, TALL=tall, WIDE=wide, WHOLE=whole, warps=1,
        )  # fmt: skip

    def _row_factors(self) -> tuple[Parts, Tensor]:
        """ALLoRA's factors: for each tensor where its first row is, and the factors."""
        begun, part = self._begun, self.part
        tall, wide = _ROW_TILE
        rows = begun.table[:, fields.ROWS] * part.members
        blocks = begun.counts((part.name, "row blocks"), -(-rows // tall))
        places = begun.counts((part.name, "rows"), rows)
        factors = begun.floats(places.count)
        begun.launch(
            moments.scale_rows, blocks.count, begun.on_device, blocks.work, places.firsts, part.numbers, factors,
            TALL=tall, WIDE=wide, RULES=part.rules,
        )  # fmt: skip
        return places, factors

    def update_low_rank(self) -> None:
        """Take the momenta of low rank that are due a step further, of tensors that are here in whole."""
        begun, part = self._begun, self.part
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
        across = begun.counts((name, "folded rows"), -(-rows // tall))
        down = begun.counts((name, "folded columns"), -(-columns // wide))
        single = begun.counts((name, "entries"), which)
        room = (entries[:, fields.RANK] * (rows + columns) + low_rank.MORE) * which
        places = begun.firsts((name, "room"), room)
        memory = begun.floats(int(room.sum()))
        every, common = (begun.on_device, part.momenta), self._common
        tile: dict[str, Any] = {"TALL": tall, "WIDE": wide, "RULES": part.rules}
        begun.launch(low_rank.look_along_rows, across.count, *every, across.work, places, *common, memory, **tile)
        begun.launch(
            low_rank.make_left, single.count, part.momenta, single.work, places, part.numbers, memory,
            CHUNK=_CHUNK, RULES=part.rules, warps=1,
        )  # fmt: skip
        begun.launch(low_rank.look_along_columns, down.count, *every, down.work, places, *common, memory, **tile)
        begun.launch(
            low_rank.make_right, single.count, part.momenta, single.work, places, memory, CHUNK=_CHUNK, warps=1
        )  # fmt: skip


@cache
def maps_of_codes_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the signed and the unsigned map with the midpoints of both, and the tables of first codes."""
    signed, unsigned = tables_of(True, device), tables_of(False, device)
    maps = torch.cat([signed.values, unsigned.values, signed.midpoints, unsigned.midpoints])
    return maps, torch.cat([signed.first, unsigned.first])

"""Codes of shards. The rows that a process holds share blocks and bytes, as those of a parameter of their own would.

Where a shard begins and ends depends on the number of processes, and so do its codes. A checkpoint has them row by row,
which says the same in more bytes: there are as many tensors, of the same shapes, whatever the number of processes. On
the same number they are found again as they were.

Every process has room for as many rows as the one with most of them, so that torch finds all parts of equal size.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..rounding import Dither
from . import AverageFormat, Format, Part, Spread, StoredAverage, matrix_shape, nibbles
from .bits import Bits, StoredBits
from .blockwise import Blockwise
from .by_row import ByRow
from .full import Full, StoredFull
from .nibbles import Nibbles, StoredNibbles


class Place(NamedTuple):
    """Where a shard is in its parameter.

    Attributes:
        first_row: the first row that is here.
        most_rows: how many rows the process with most of them has.
    """

    first_row: int
    most_rows: int


class ShardFormat(Format):
    """A format of shards: `shape` is everywhere that of the rows that are here. Its keys are those of a checkpoint."""

    @abstractmethod
    def saved(self, shape: torch.Size) -> Format:
        """The format that a checkpoint has in its place."""

    @abstractmethod
    def by_row(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        """The tensors of `saved` that say the same as some of this format, of a stack of n parameters: (n, ...)."""

    @abstractmethod
    def from_rows(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor] | None:
        """The reverse of `by_row`; None where rows that are here together were not coded together."""


def saved_format(code: Format, shape: torch.Size) -> Format:
    """The format that a checkpoint has of a state in some format; of a shard, `shape` is that of its rows."""
    return code.saved(shape) if isinstance(code, ShardFormat) else code


class ShardAverageFormat(AverageFormat, ShardFormat):
    """A format of running averages of shards."""

    @abstractmethod
    def summand_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """The shapes of what `StoredShardAverage.summands` gives of a single parameter."""


class StoredShardAverage(StoredAverage):
    """A running average of a shard, whose update takes sums over the whole tensor.

    Attributes:
        summand_count: how many tensors `summands` gives.
    """

    summand_count: int
    _known: tuple[Sequence[Tensor], Tensor | None] | None = None

    @abstractmethod
    def summands(self, raw: Tensor, rate: float, dither: Dither) -> list[Tensor]:
        """What the processes add up before an update towards a multiple of `raw`: (tensors, ...) float64 each."""

    def knowing(self, totals: Sequence[Tensor], factor: Tensor | None) -> StoredShardAverage:
        """The same average, for one update.

        Args:
            totals: the sums over all processes of what `summands` gave.
            factor: what multiple of `raw` the target is, (tensors,); None for the same.
        """
        found = copy.copy(self)
        found._known = totals, factor
        return found

    def _totals(self) -> tuple[Sequence[Tensor], Tensor | None]:
        assert self._known is not None, "an average of a shard is updated without the sums over whole tensors"
        return self._known


@dataclass(frozen=True)
class BlockwiseOfShard(Blockwise, ShardFormat):
    """Blocks of some rows, or of a part of one.

    Attributes:
        most_rows: the rows of the process that has most.
    """

    most_rows: int

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        parts = super().parts(shape)
        _, columns = matrix_shape(shape)
        blocks = -(-self.most_rows * columns // self.block)
        return {
            "_q": parts["_q"]._replace(spread=Spread.BY_ROW),
            "_q_scale": parts["_q_scale"]._replace(shape=(blocks,), spread=Spread.EACH),
        }

    def saved(self, shape: torch.Size) -> ByRow:
        _, columns = matrix_shape(shape)
        return ByRow(Blockwise(self.signed, self.root, min(self.block, columns)))

    def by_row(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        codes, scale = tensors
        rows, columns = matrix_shape(shape)
        together, parts = self._rows_and_parts(columns)
        scales = scale.view(len(scale), -1, parts).repeat_interleave(together, dim=1)[:, :rows].contiguous()
        return [codes.reshape(len(codes), rows, columns), scales]

    def from_rows(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor] | None:
        codes, scales = tensors
        rows, columns = matrix_shape(shape)
        together, parts = self._rows_and_parts(columns)
        first = scales[:, ::together]
        if scales.shape[2] != parts or not torch.equal(first.repeat_interleave(together, dim=1)[:, :rows], scales):
            return None
        return [codes.reshape(len(codes), *shape), _with_room(first.flatten(1), self.parts(shape)["_q_scale"])]

    def _rows_and_parts(self, columns: int) -> tuple[int, int]:
        """How many rows a block has, and how many blocks a row."""
        return max(self.block // columns, 1), max(columns // self.block, 1)


@dataclass(frozen=True)
class BitsOfShard(Bits, ShardFormat):
    """As `Bits`, with room for the rows of the process that has most, `most_rows`."""

    most_rows: int

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        _, columns = matrix_shape(shape)
        return {"_q": Part(torch.uint8, (-(-self.most_rows * columns // 8),), spread=Spread.EACH)}

    def saved(self, shape: torch.Size) -> ByRow:
        return ByRow(Bits())

    def by_row(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        return _written_anew(StoredBits(tensors, shape).read(), self.saved(shape), shape)

    def from_rows(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        return _written_anew(self.saved(shape).over(tensors, shape).read(), self, shape)


@dataclass(frozen=True)
class NibblesOfShard(Nibbles, ShardAverageFormat):
    """As `Nibbles`, with room for the rows of the process that has most, and levels as wide as the whole tensor asks.

    Attributes:
        most_rows: the rows of the process that has most.
        numel: the elements of the whole tensor.
    """

    most_rows: int
    numel: int

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        _, columns = matrix_shape(shape)
        codes = Part(torch.int8, (-(-self.most_rows * columns // 2),), spread=Spread.EACH)
        return {"_q": codes, "_q_scale": Part(torch.float32, (1,), spread=Spread.EACH)}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredNibblesOfShard:
        return StoredNibblesOfShard(self.numel, tensors, shape)

    def summand_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        return [(3,)]

    def saved(self, shape: torch.Size) -> ByRow:
        return ByRow(Nibbles())

    def by_row(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        codes, scale = tensors
        (rows, columns), n = matrix_shape(shape), len(codes)
        packed = codes.new_empty(n * rows, -(-columns // 2))
        nibbles.repack(codes, rows * columns, packed)
        return [packed.view(n, rows, packed.shape[1]), scale.unsqueeze(1).repeat(1, rows, 1)]

    def from_rows(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor] | None:
        packed, scales = tensors
        (rows, columns), n = matrix_shape(shape), len(packed)
        if not torch.equal(scales, scales[:, :1].expand_as(scales)):
            return None
        codes = packed.new_zeros(n, *self.parts(shape)["_q"].shape)
        nibbles.repack(packed.reshape(n * rows, packed.shape[2]), columns, codes)
        return [codes, scales[:, 0] if rows else scales.new_zeros(n, 1)]


class StoredNibblesOfShard(StoredNibbles, StoredShardAverage):
    """A state in the format `NibblesOfShard`."""

    summand_count = 1

    def __init__(self, numel: int, tensors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__(tensors, shape)
        self._numel = numel

    def summands(self, raw: Tensor, rate: float, dither: Dither) -> list[Tensor]:
        """raw . raw, raw . m and m . m, of which the norm of the new m is made."""
        values, old = raw.flatten(1), self.read().flatten(1)
        pairs = (values, values), (values, old), (old, old)
        return [torch.stack([torch.mul(a, b).sum(1, dtype=torch.float64) for a, b in pairs], dim=1)]

    def _new_norms(self, values: Tensor, rate: float) -> tuple[Tensor, int]:
        (sums,), factor = self._totals()
        f, old = 1.0 if factor is None else factor.double(), (1 - rate) / rate
        squares = f * f * sums[:, 0] + 2 * f * old * sums[:, 1] + old * old * sums[:, 2]
        return squares.clamp_min_(0.0).sqrt_().unsqueeze(1), self._numel


@dataclass(frozen=True)
class FullOfShard(Full, ShardFormat):
    """As `Full`, of an average that the other processes code: they ask this one for its part of the sums.

    Attributes:
        coded: the format that they have.
    """

    coded: ShardAverageFormat | None = None

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredFullOfShard:
        assert self.coded is not None
        return StoredFullOfShard(self.coded.summand_shapes(shape), tensors, shape)

    def saved(self, shape: torch.Size) -> Full:
        return Full(self.dtype)

    def by_row(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        return list(tensors)

    def from_rows(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        return list(tensors)


class StoredFullOfShard(StoredFull, StoredShardAverage):
    """A state in the format `FullOfShard`. It adds nothing to the sums, which the rows of the others decide about."""

    def __init__(self, summand_shapes: Sequence[tuple[int, ...]], tensors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__(tensors, shape)
        self._shapes = summand_shapes
        self.summand_count = len(summand_shapes)

    def summands(self, raw: Tensor, rate: float, dither: Dither) -> list[Tensor]:
        (own,) = self.tensors
        return [own.new_zeros(len(own), *shape, dtype=torch.float64) for shape in self._shapes]


def _with_room(values: Tensor, part: Part) -> Tensor:
    """(n, ...) values in (n, *part.shape), with zeros after them."""
    found = values.new_zeros(len(values), *part.shape)
    found[..., : values.shape[-1]] = values
    return found


def _written_anew(values: Tensor, code: Format, shape: torch.Size) -> list[Tensor]:
    """A state of yes and no in another format."""
    stored = code.new(len(values), shape, values.device)
    stored.write(values, Dither(torch.zeros(len(values), dtype=torch.int32, device=values.device), 0))
    return list(stored.tensors)

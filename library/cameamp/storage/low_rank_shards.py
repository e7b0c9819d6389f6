"""Averages of low rank of a matrix whose rows several processes share.

Each has its rows of the left factor, and all have the same right one. An iteration is that of `low_rank.py`. With the
probe P, the old matrix L R, of which L has the share that is kept, and the target X = f G, of which only G is known
when the processes speak, it looks at

    Y = L R P^T + rate X P^T

makes Y's columns orthonormal, Y T, and projects on them. All that needs sums over rows follows from three of them:
L^T L, L^T G and (G P^T)^T G. So the processes speak once, and need not know f by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from ..devices import full_precision
from ..rounding import Dither
from . import AverageFormat, Part, Spread, StoredAverage, matrix_shape
from .low_rank import SMALLEST_NEW_PART, SMALLEST_NORM, LowRank, StoredLowRank, code_factor, probe_of
from .shards import Place, ShardAverageFormat, StoredShardAverage

# Rows that are merged: a checkpoint of shards has a byte for where in its group a row is.
MOST_TOGETHER = 128


def _together_and_parts(shape: torch.Size, columns: int) -> tuple[int, int]:
    """How many rows of a parameter make a row of its folded matrix, and into how many of those one of them is cut."""
    _, own = matrix_shape(shape)
    return max(columns // own, 1), max(own // columns, 1)


@dataclass(frozen=True)
class LowRankByRow(AverageFormat):
    """As a checkpoint has it: X_q and X_q_scale have the left factor's codes, and what they are worth, of each row.

    Of rows that are merged, X_q also has which of them each row is.

    Attributes:
        columns: of the folded matrix.
        rank: of it.
    """

    columns: int
    rank: int

    suffixes = ("_q", "_q_right", "_q_scale")

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        rows, _ = matrix_shape(shape)
        together, parts = _together_and_parts(shape, self.columns)
        return {
            "_q": Part(torch.int8, (rows, parts * self.rank + (together > 1)), spread=Spread.BY_ROW),
            "_q_right": Part(torch.int8, (self.rank, self.columns)),
            "_q_scale": Part(torch.float32, (rows, self.rank), spread=Spread.BY_ROW),
        }

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredLowRankByRow:
        return StoredLowRankByRow(self, tensors, shape)

    def as_saved(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> LowRankByRow:
        """As of `Format`; any rank, and any number of parts of a row or of rows together, is accepted."""
        _, columns = matrix_shape(shape)
        right = tensors["_q_right"]
        if right.ndim != 2 or right.numel() == 0 or (columns % right.shape[1] and right.shape[1] % columns):
            raise ValueError(f"_q_right: has shape {tuple(right.shape)}")
        found = replace(self, columns=right.shape[1], rank=len(right))
        super(LowRankByRow, found).as_saved(tensors, shape)
        together, parts = _together_and_parts(shape, found.columns)
        if together > MOST_TOGETHER:
            raise ValueError(f"_q_right: has {found.columns} columns, for {together} rows of the parameter")
        places = tensors["_q"][:, parts * found.rank :]
        if ((places < 0) | (places >= together)).any():
            raise ValueError(f"_q: has a row beyond the {together} of its group")
        return found


class StoredLowRankByRow(StoredAverage):
    """A state in the format `LowRankByRow`, which is only read."""

    def __init__(self, code: LowRankByRow, tensors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__(tensors, shape)
        self._code = code

    def read(self, out: Tensor | None = None) -> Tensor:
        codes, right, scale = self.tensors
        (n, rank, _), columns = right.shape, self.columns
        together, parts = _together_and_parts(torch.Size((self.rows, columns)), self._code.columns)
        if together > 1:
            # Each row takes its own part of the right factor.
            places = codes[:, :, rank].long().view(n, self.rows, 1, 1).expand(-1, -1, rank, columns)
            own = right.view(n, rank, together, columns).transpose(1, 2).to(torch.float32).gather(1, places)
            return ((codes[:, :, :rank] * scale).unsqueeze(3) * own).sum(dim=2)
        left = codes.view(n, self.rows, parts, rank) * scale.unsqueeze(2)
        with full_precision(right.device):
            values = torch.bmm(left.flatten(1, 2), right.to(torch.float32))
        return values.view(n, self.rows, columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        raise NotImplementedError("a checkpoint's format is not written to")

    lerp = write  # type: ignore[assignment]


@dataclass(frozen=True)
class LowRankOfShard(ShardAverageFormat):
    """X_q holds this process's part of the left factor, X_q_right the right one, X_q_scale what their product is worth.

    Rows are cut, or merged as those of the whole parameter are; rows that other processes have are zeros here.

    Attributes:
        columns: of the folded matrix.
        rank: rows of either factor.
        place: where the shard is.
    """

    columns: int
    rank: int
    place: Place

    suffixes = LowRankByRow.suffixes

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        together, parts = _together_and_parts(shape, self.columns)
        # All shards but the last ones have the most rows; so far inside a group one of them can begin.
        most_rows = self.place.most_rows
        most_lead = together - gcd(together, most_rows)
        room = -(-(most_rows + most_lead) // together) * parts
        return {
            "_q": Part(torch.int8, (self.rank, room), spread=Spread.EACH),
            "_q_right": Part(torch.int8, (self.rank, self.columns)),
            "_q_scale": Part(torch.float32, (self.rank,), spread=Spread.EACH),
        }

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredLowRankOfShard:
        rows, columns = matrix_shape(shape)
        _, parts = _together_and_parts(shape, self.columns)
        groups, lead = self._groups(rows, shape)
        folded = LowRank(groups * parts, self.columns, self.rank)
        return StoredLowRankOfShard(folded, tensors, shape, lead * columns)

    def summand_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        return [(self.rank, self.rank), (self.rank, self.columns), (self.rank, self.columns)]

    def saved(self, shape: torch.Size) -> LowRankByRow:
        return LowRankByRow(self.columns, self.rank)

    def by_row(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        codes, right, scale = tensors
        (rows, _), n = matrix_shape(shape), len(codes)
        together, parts = _together_and_parts(shape, self.columns)
        groups, lead = self._groups(rows, shape)
        own = codes[:, :, : groups * parts].reshape(n, self.rank, groups, parts).permute(0, 2, 3, 1)
        found = own.reshape(n, groups, parts * self.rank).repeat_interleave(together, dim=1)[:, lead : lead + rows]
        if together > 1:
            places = torch.arange(lead, lead + rows, device=codes.device).remainder(together).to(torch.int8)
            found = torch.cat([found, places.view(1, rows, 1).expand(n, -1, -1)], dim=2)
        return [found.contiguous(), right, scale.unsqueeze(1).repeat(1, rows, 1)]

    def from_rows(self, tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
        codes, right, scales = tensors
        (rows, _), n = matrix_shape(shape), len(codes)
        together, parts = _together_and_parts(shape, self.columns)
        groups, lead = self._groups(rows, shape)
        own = codes[:, :, : parts * self.rank].view(n, rows, parts, self.rank)
        scale = scales.amax(dim=1) if rows else scales.new_zeros(n, self.rank)
        if not torch.equal(scales, scale.unsqueeze(1).expand_as(scales)):
            # Of several processes: at most 127 times the largest, so no code is cut.
            shares = scales / scale.clamp_min(SMALLEST_NORM).unsqueeze(1)
            own = (own * shares.unsqueeze(2)).round_().to(torch.int8)
        if together > 1:
            own = _of_groups(own, groups, lead, together)
        found = codes.new_zeros(n, *self.parts(shape)["_q"].shape)
        found[:, :, : groups * parts] = own.permute(0, 3, 1, 2).reshape(n, self.rank, groups * parts)
        return [found, right, scale]

    def _groups(self, rows: int, shape: torch.Size) -> tuple[int, int]:
        """How many groups some rows are in that are here, and how many rows of the first one are not."""
        together, _ = _together_and_parts(shape, self.columns)
        lead = self.place.first_row % together if rows else 0
        return -(-(lead + rows) // together), lead


def _of_groups(codes: Tensor, groups: int, lead: int, together: int) -> Tensor:
    """The mean of the codes of each group's rows, (tensors, rows, ...): processes may have had parts of a group."""
    n, rows, *more = codes.shape
    padded = codes.new_zeros(n, groups * together, *more, dtype=torch.float32)
    padded[:, lead : lead + rows] = codes
    there = padded.new_zeros(groups * together)
    there[lead : lead + rows] = 1
    counts = there.view(groups, together).sum(dim=1).view(1, groups, *[1] * len(more))
    return (padded.view(n, groups, together, *more).sum(dim=2) / counts).round_().to(codes.dtype)


class StoredLowRankOfShard(StoredLowRank, StoredShardAverage):
    """A state in the format `LowRankOfShard`."""

    summand_count = 3

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        codes, right, scale = self.tensors
        return codes[:, :, : self.folded.rows], right, scale

    @staticmethod
    def joined(states: Sequence[StoredLowRank]) -> tuple[Tensor, Tensor]:
        lefts, rights, _ = zip(*(state.factors() for state in states))
        return torch.cat(lefts, dim=1).to(torch.float32), torch.cat(rights, dim=1).to(torch.float32)

    def write(self, stack: Tensor, dither: Dither) -> None:
        """Only zeros, of which each process knows what all have."""
        if stack.any():
            raise NotImplementedError("processes must agree on the right factor of an average of low rank")
        for tensor in self.tensors:
            tensor.zero_()

    def summands(self, raw: Tensor, rate: float, dither: Dither) -> list[Tensor]:
        """L^T L, L^T G and (G P^T)^T G."""
        return self.look(raw, rate, dither)[1]

    def look(self, raw: Tensor, rate: float, dither: Dither) -> tuple[Tensor, list[Tensor]]:
        """G P^T, (tensors, rows, rank), and the summands."""
        left, _, probe = self._begin(rate, dither.step)
        matrix = self.fold(raw)
        with full_precision(raw.device):
            seen = torch.bmm(matrix, probe.transpose(1, 2))
            found = [torch.bmm(a.transpose(1, 2), b) for a, b in ((left, left), (left, matrix), (seen, matrix))]
        return seen, [each.double() for each in found]

    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> None:
        """One subspace iteration, as of a matrix that is whole."""
        totals, factor = self._totals()
        *_, probe = self._begin(rate, dither.step)
        matrix = self.fold(target)
        with full_precision(target.device):
            seen = torch.bmm(matrix, probe.transpose(1, 2))
        self.follow(seen, totals, factor, rate, dither)

    def follow(
        self, seen: Tensor, totals: Sequence[Tensor], factor: Tensor | None, rate: float, dither: Dither
    ) -> None:
        """As `lerp`, from X P^T and what `knowing` takes."""
        left, right, probe = self._begin(rate, dither.step)
        turn, new_right = _turned(totals, right.double(), probe.double(), rate, factor)
        with full_precision(seen.device):
            looked = torch.bmm(left, torch.bmm(right, probe.transpose(1, 2))).add_(seen, alpha=rate)
            new_left = torch.bmm(turn.float().transpose(1, 2), looked.transpose(1, 2))
        left_codes, right_codes, scale = self.factors()
        of_right = code_factor(new_right.float(), right_codes)
        of_left = code_factor(new_left, left_codes) if self.folded.rows else torch.zeros_like(of_right)
        torch.mul(of_left, of_right, out=scale)

    def _begin(self, rate: float, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """L, (tensors, rows, rank), R and P, (tensors, rank, columns)."""
        codes, right, scale = self.factors()
        left = codes.to(torch.float32).mul_((scale * (1 - rate)).unsqueeze(2)).transpose(1, 2)
        right = right.to(torch.float32)
        return left, right, probe_of(right, step)


def _turned(
    totals: Sequence[Tensor], right: Tensor, probe: Tensor, rate: float, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """T, (tensors, rank, rank), and the new right factor, (tensors, rank, columns); float64."""
    of_left, left_matrix, seen_matrix = totals
    f = right.new_ones(len(right), 1, 1) if factor is None else factor.double().view(-1, 1, 1)
    probe = probe.transpose(1, 2)
    start = torch.bmm(right, probe)  # Y = L start + rate f G P^T
    old, both, new = (
        torch.bmm(start.transpose(1, 2), torch.bmm(of_left, start)),
        torch.bmm(start.transpose(1, 2), torch.bmm(left_matrix, probe)) * (rate * f),
        torch.bmm(seen_matrix, probe) * (rate * f).square(),
    )
    turn = _orthonormalizing(old + both + both.transpose(1, 2) + new)
    seen_left = torch.bmm(start.transpose(1, 2), of_left)
    seen_left = seen_left + torch.bmm(left_matrix, probe).transpose(1, 2) * (rate * f)
    seen_target = (torch.bmm(start.transpose(1, 2), left_matrix) + seen_matrix * (rate * f)) * (rate * f)
    return turn, torch.bmm(turn.transpose(1, 2), torch.bmm(seen_left, right) + seen_target)


def _orthonormalizing(products: Tensor) -> Tensor:
    """T, for which the columns of Y T are orthonormal, from Y^T Y, (tensors, few, few); see `low_rank._orthonormal`."""
    count = products.shape[1]
    made: list[Tensor] = []
    for place in range(count):
        column = torch.zeros_like(products[:, :, 0])
        column[:, place] = 1.0
        least = products[:, place, place].clamp_min(0.0).sqrt() * SMALLEST_NEW_PART
        for known in made:
            along = torch.einsum("ti,tij,tj->t", known, products, column)
            column = column - known * along.unsqueeze(1)
        norm = torch.einsum("ti,tij,tj->t", column, products, column).clamp_min(0.0).sqrt()
        divisor = torch.where(norm > least, norm, torch.inf) if made else norm.clamp_min(SMALLEST_NORM)
        made.append(column / divisor.unsqueeze(1))
    return torch.stack(made, dim=2)

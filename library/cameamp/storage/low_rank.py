"""A matrix as the product of two thin ones, each element of which is one byte.

Only the largest singular directions survive. Averages of a LoRA factor's gradients over many steps
are of low rank for the most part, so a few bytes a row and a column say more of them than a bit an element would. The
factors follow the matrix by subspace iteration from where they were (as PowerSGD does, arXiv 1905.13727).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

import torch
from torch import Tensor

from ..devices import full_precision
from ..rounding import Dither, uniform_noise
from . import AverageFormat, Part, StoredAverage, matrix_shape

LARGEST_CODE = 127
# Below it only what is all zeros is divided.
SMALLEST_NORM = 1e-37
# Of a direction's length, what must lie outside of the directions before it to be one of its own.
SMALLEST_NEW_PART = 1e-3


@dataclass(frozen=True)
class LowRank(AverageFormat):
    """X_q holds the left factor beside the right one, (rank, rows + columns); X_q_scale what their product is worth.

    Attributes:
        rows, columns: the elements in their order as a matrix, which may be folded otherwise than the parameter, and
            longer than it: then zeros follow.
        rank: rows of either factor.
    """

    rows: int
    columns: int
    rank: int

    suffixes = ("_q", "_q_scale")

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {
            "_q": Part(torch.int8, (self.rank, self.rows + self.columns)),
            "_q_scale": Part(torch.float32, (self.rank,)),
        }

    def as_saved(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> LowRank:
        """As of `Format`; also of older checkpoints, which have wide matrices otherwise, their factors being longer."""
        found, length = self, tensors["_q"].shape[-1:].numel()
        if length != self.rows + self.columns:
            rows, columns = _older_folding(length, shape)
            found = replace(self, rows=rows, columns=columns) if rows * columns == shape.numel() else self
        return super(LowRank, found).as_saved(tensors, shape)  # type: ignore[return-value]

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredLowRank:
        return StoredLowRank(self, tensors, shape)


def _older_folding(length: int, shape: torch.Size) -> tuple[int, int]:
    """Rows and columns, so many together, of a matrix of as many elements, if there is one."""
    rows, columns = matrix_shape(shape)
    short = (length - isqrt(max(length * length - 4 * rows * columns, 0))) // 2
    return (short, length - short) if rows < columns else (length - short, short)


class StoredLowRank(StoredAverage):
    """A state in the format `LowRank`.

    Attributes:
        folded: the folded matrix.
        lead: zeros in it before the parameter's first element.
    """

    def __init__(self, folded: LowRank, tensors: Sequence[Tensor], shape: torch.Size, lead: int = 0) -> None:
        super().__init__(tensors, shape)
        self.folded, self.lead = folded, lead

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of the left one, (tensors, rank, rows), and of the right one, and what their product is worth."""
        codes, scale = self.tensors
        return codes[:, :, : self.folded.rows], codes[:, :, self.folded.rows :], scale

    @staticmethod
    def joined(states: Sequence[StoredLowRank]) -> tuple[Tensor, Tensor]:
        """The codes of both factors of some states of equal folding, (tensors, ranks, rows or columns) float32."""
        rows = states[0].folded.rows
        factors = torch.cat([state.tensors[0] for state in states], dim=1).to(torch.float32)
        return factors[:, :, :rows], factors[:, :, rows:]

    def fold(self, stack: Tensor) -> Tensor:
        """Some stack of the parameters' elements as folded matrices."""
        values = stack.flatten(1)
        missing = self.folded.rows * self.folded.columns - values.shape[1]
        padded = torch.nn.functional.pad(values, (self.lead, missing - self.lead)) if missing else values
        return padded.view(len(stack), self.folded.rows, self.folded.columns)

    def unfold(self, matrices: Tensor) -> Tensor:
        """The parameters' elements in some folded matrices, (tensors, rows, columns)."""
        own = matrices.flatten(1)[:, self.lead : self.lead + self.rows * self.columns]
        return own.reshape(len(own), self.rows, self.columns)

    def read(self, out: Tensor | None = None) -> Tensor:
        left, right = _factors([(self, 1.0)])
        with full_precision(right.device):
            values = torch.bmm(left, right)
        return self.unfold(values)

    def write(self, stack: Tensor, dither: Dither) -> None:
        self.lerp(stack, 1.0, dither)

    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> None:
        """Without unpacking it: one subspace iteration, which follows a matrix that changes by a tenth."""
        left_codes, right_codes, scale = self.factors()
        matrix = self.fold(target)
        old_left = left_codes.to(torch.float32).mul_((scale * (1 - rate)).unsqueeze(2)).transpose(1, 2)
        old_right = right_codes.to(torch.float32)
        probe = _two_or_more(probe_of(old_right, dither.step)).transpose(1, 2)
        with full_precision(scale.device):
            seen = torch.bmm(old_left, torch.bmm(old_right, probe)).baddbmm_(matrix, probe, alpha=rate)
            left = _orthonormal(seen[:, :, : self.folded.rank].transpose(1, 2).contiguous())
            right = torch.bmm(torch.bmm(left, old_left), old_right).baddbmm_(left, matrix, alpha=rate)
        torch.mul(code_factor(left, left_codes), code_factor(right, right_codes), out=scale)


def probe_of(right: Tensor, step: int) -> Tensor:
    """What an iteration multiplies the matrix by: its right factor, (tensors, rank, columns), and a little noise.

    Without a little of every direction, one that the factors lack could never come in. It differs at every step.
    """
    _, rank, columns = right.shape
    return right + _noise(columns * rank, right.device).roll(step).view(1, rank, columns)


def code_factor(factor: Tensor, codes: Tensor) -> Tensor:
    """Write a factor, (tensors, rank, elements), which is overwritten. Returns the value of each row's code 1."""
    step: Tensor = torch.linalg.vector_norm(factor, torch.inf, dim=2).div_(LARGEST_CODE)
    codes.copy_(factor.div_(step.clamp_min(SMALLEST_NORM).unsqueeze(2)).round_())
    return step


def add_to(stack: Tensor, stack_share: float, states: Sequence[tuple[StoredLowRank, float]]) -> None:
    """stack_share * stack + the sum of share * state over some states of equal folding, all in one pass.

    Args:
        stack: (tensors, rows, columns); becomes the result.
        stack_share: its own share.
        states: the states, and the share of each.
    """
    first, _ = states[0]
    folded = first.folded
    left, right = _factors(states)
    with full_precision(stack.device):
        if folded.rows * folded.columns == stack[0].numel():
            stack.view(len(stack), folded.rows, folded.columns).baddbmm_(left, right, beta=stack_share)
        else:
            stack.mul_(stack_share).add_(first.unfold(torch.bmm(left, right)))


def _factors(states: Sequence[tuple[StoredLowRank, float]]) -> tuple[Tensor, Tensor]:
    """(tensors, rows, ranks) and (tensors, ranks, columns), whose product is the sum of share * state."""
    left, right = states[0][0].joined([state for state, _ in states])
    shared = torch._foreach_mul([state.tensors[-1] for state, _ in states], [share for _, share in states])
    left.mul_(torch.cat(shared, dim=1).unsqueeze(2))
    return _two_or_more(left).transpose(1, 2), _two_or_more(right)


@cache
def _noise(count: int, device: torch.device) -> Tensor:
    """Numbers between -1/2 and 1/2, always the same."""
    alone = Dither(torch.zeros(1, dtype=torch.int32, device=device), 0)
    return uniform_noise(alone, 0, count).flatten().sub_(0.5)


def _two_or_more(factor: Tensor) -> Tensor:
    """A factor with a row of zeros added where it has one row: CPUs take ten times as long for an inner size of 1."""
    return factor if factor.shape[1] > 1 else torch.nn.functional.pad(factor, (0, 0, 0, 1))


def _orthonormal(x: Tensor) -> Tensor:
    """The rows of each matrix, (tensors, few, many), made orthogonal to one another, and of norm 1.

    A row that lies in the span of the rows before it becomes zeros: what is left of it is rounding error.
    """
    first, *others = x.unbind(1)
    made = [first / torch.linalg.vector_norm(first, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)]
    for row in others:
        least = torch.linalg.vector_norm(row, dim=1, keepdim=True).mul_(SMALLEST_NEW_PART)
        for known in made:
            row = row - known * (known * row).sum(dim=1, keepdim=True)
        norm = torch.linalg.vector_norm(row, dim=1, keepdim=True)
        made.append(row / torch.where(norm > least, norm, torch.inf))
    return torch.stack(made, dim=1)

"""A matrix as the product of two thin ones, each element of which is one byte.

What is lost is what the largest singular directions do not hold. Averages of a LoRA factor's gradients over many steps
are of low rank for the most part, so a few bytes a row and a column say more of them than a bit an element would. The
factors follow the matrix by subspace iteration from where they were (as PowerSGD does, arXiv 1905.13727).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither, uniform_noise
from . import Buffers

_LARGEST_CODE = 127

# Each follows the matrix further; two suffice where the matrix changes by a tenth.
_ITERATIONS = 2


@dataclass(frozen=True)
class LowRank:
    """X_q holds the left factor above the right, (rows + columns, rank); X_q_scale the scale of each column of both.

    Attributes:
        rows, columns: the elements in their order as a matrix, which may be folded otherwise than the parameter, and
            longer than it: then zeros follow.
        rank: columns of either factor.
    """

    rows: int
    columns: int
    rank: int

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}_q", f"{name}_q_scale")

    def bytes(self) -> int:
        """What one parameter's state takes."""
        return (self.rows + self.columns + 8) * self.rank

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, dither: Dither) -> Buffers:
        if fill != 0:
            raise ValueError(f"a state of low rank starts at 0, not {fill}")
        size = (n, self.rows + self.columns, self.rank)
        return {
            f"{name}_q": torch.zeros(size, dtype=torch.int8, device=dither.device),
            f"{name}_q_scale": torch.zeros(n, 2, self.rank, dtype=torch.float32, device=dither.device),
        }

    def read(self, name: str, buffers: Buffers, rows: int, columns: int) -> Tensor:
        codes, scale = buffers[f"{name}_q"], buffers[f"{name}_q_scale"]
        left = codes[:, : self.rows].to(torch.float32).mul_(scale.prod(dim=1, keepdim=True))
        right = codes[:, self.rows :].to(torch.float32)
        values = torch.bmm(left, right.transpose(1, 2))
        return values.flatten(1)[:, : rows * columns].reshape(-1, rows, columns)

    def write(self, name: str, buffers: Buffers, stack: Tensor, dither: Dither) -> None:
        codes, scale = buffers[f"{name}_q"], buffers[f"{name}_q_scale"]
        values = stack.flatten(1)
        missing = self.rows * self.columns - values.shape[1]
        matrix = (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(
            -1, self.rows, self.columns
        )
        # A little of every direction, or one that the factors lack could never come in.
        noise = uniform_noise(dither, 0, self.columns * self.rank).view(-1, self.columns, self.rank)
        right = codes[:, self.rows :].to(torch.float32).add_(noise).sub_(0.5)
        for _ in range(_ITERATIONS):
            left = _orthonormal(torch.bmm(matrix, right))
            right = torch.bmm(matrix.transpose(1, 2), left)
        for place, factor, part in ((0, left, codes[:, : self.rows]), (1, right, codes[:, self.rows :])):
            largest = torch.maximum(factor.amax(dim=1), factor.amin(dim=1).neg_())
            scale[:, place] = largest / _LARGEST_CODE
            part.copy_(
                factor.mul_((_LARGEST_CODE / torch.where(largest > 0, largest, torch.inf)).unsqueeze(1)).round_()
            )


def _orthonormal(x: Tensor) -> Tensor:
    """The columns of each matrix, (tensors, rows, few), made orthogonal one after the other, of norm 1 or 0."""
    columns: list[Tensor] = []
    for column in x.unbind(2):
        for known in columns:
            column = column - known * (known * column).sum(dim=1, keepdim=True)
        norm = torch.linalg.vector_norm(column, dim=1, keepdim=True)
        columns.append(column / torch.where(norm > 0, norm, torch.inf))
    return torch.stack(columns, dim=2)

"""Means of squares stored as the means of their rows and columns (Adafactor, arXiv 1804.04235; CAME, arXiv 2307.02047).

In the papers, with the running means R of the rows and C of the columns of a matrix of squares, its running mean is

    V = R C / mean(R)

which is exact for a matrix of rank 1, and takes rows + columns numbers instead of rows * columns. The running means of
rows and columns of V are R and C, so storing the means of an updated V is what the papers do. What differs here: the
rule divides by the V that it has updated, with the newest squares element by element, and only what is kept has rank 1.
So no element is divided by much less than its own newest square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Format, Part, Stored, matrix_shape

# Below any mean of what has a floor of 1e-30, times 1 - b2; a state that is 0 has means of 0.
_SMALLEST_MEAN = 1e-37


@dataclass(frozen=True)
class Factored(Format):
    """The mean of each row, and of each column, in float32."""

    suffixes = ("_row", "_col")

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        rows, columns = matrix_shape(shape)
        return {"_row": Part(torch.float32, (rows,)), "_col": Part(torch.float32, (columns,))}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredFactored:
        return StoredFactored(tensors, shape)


class StoredFactored(Stored):
    """A state in the format `Factored`.

    Example:
        >>> state = Factored().new(1, torch.Size([2, 2]), torch.device("cpu"))
        >>> state.write(torch.tensor([[[1.0, 3.0], [2.0, 6.0]]]), dither=None)
        >>> [mean.tolist() for mean in state.tensors]
        [[[2.0, 4.0]], [[1.5, 4.5]]]
        >>> state.read().tolist()
        [[[1.0, 3.0], [2.0, 6.0]]]
    """

    def read(self, out: Tensor | None = None) -> Tensor:
        rows, columns = self.tensors
        # The quotient first: of two small means the product is 0.
        shares = columns / columns.mean(dim=1, keepdim=True).clamp_min_(_SMALLEST_MEAN)
        return torch.mul(rows.unsqueeze(2), shares.unsqueeze(1), out=out)

    def write(self, stack: Tensor, dither: Dither) -> None:
        rows, columns = self.tensors
        torch.mean(stack, dim=2, out=rows)
        torch.mean(stack, dim=1, out=columns)

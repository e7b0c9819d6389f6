"""Codes as checkpoints of shards have them: every row of a parameter as if it were a parameter of its own.

Shards are some of the rows, so such tensors have the same shapes on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Format, Part, Spread, Stored, matrix_shape


@dataclass(frozen=True)
class ByRow(Format):
    """The tensors of another format, with one more dimension in front: the rows.

    Attributes:
        of_row: the format of each row.
    """

    of_row: Format

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.of_row.suffixes

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        rows, columns = matrix_shape(shape)
        return {
            suffix: part._replace(shape=(rows, *part.shape), spread=Spread.BY_ROW)
            for suffix, part in self.of_row.parts(torch.Size((columns,))).items()
        }

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredByRow:
        return StoredByRow(self.of_row, tensors, shape)

    def as_saved(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> ByRow:
        rows, columns = matrix_shape(shape)
        for suffix, part in self.parts(shape).items():
            if tensors[suffix].ndim != len(part.shape) or len(tensors[suffix]) != rows:
                raise ValueError(f"{suffix}: has shape {tuple(tensors[suffix].shape)}")
        # Where no row is here, the shape of one is still known.
        first = {
            suffix: tensor[0] if rows else tensor.new_zeros(tensor.shape[1:]) for suffix, tensor in tensors.items()
        }
        return ByRow(self.of_row.as_saved(first, torch.Size((columns,))))


class StoredByRow(Stored):
    """A state in the format `ByRow`."""

    def __init__(self, of_row: Format, tensors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__(tensors, shape)
        self._of_row = of_row

    def read(self, out: Tensor | None = None) -> Tensor:
        return self._all_rows().read().view(len(self.tensors[0]), self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        self._all_rows().write(stack.reshape(-1, self.columns, 1), dither)

    def _all_rows(self) -> Stored:
        """All rows of all tensors, as so many tensors of one column."""
        tensors = [tensor.reshape(-1, *tensor.shape[2:]) for tensor in self.tensors]
        return self._of_row.over(tensors, torch.Size((self.columns,)))

"""States stored as they are: the rules update the tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import AverageFormat, Part, Scaled, Spread, StoredAverage


@dataclass(frozen=True)
class Full(AverageFormat):
    """One tensor, of the dtype that the rules compute in."""

    dtype: torch.dtype = torch.float32

    suffixes = ("",)

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {"": Part(self.dtype, tuple(shape), spread=Spread.BY_ROW)}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredFull:
        return StoredFull(tensors, shape)


class StoredFull(StoredAverage):
    """A state in the format `Full`."""

    def read(self, out: Tensor | None = None) -> Tensor:
        return self.tensors[0].view(len(self.tensors[0]), self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        (own,) = self.tensors
        if stack.data_ptr() != own.data_ptr():  # Rules mostly update the tensor itself.
            own.copy_(stack.view_as(own))

    def fill(self, value: float, dither: Dither) -> None:
        self.tensors[0].fill_(value)

    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Scaled:
        average = self.tensors[0].view(target.shape).lerp_(target, rate)
        return Scaled(average.clone() if out is None else out.copy_(average), 1.0)

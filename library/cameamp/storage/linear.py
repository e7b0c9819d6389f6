"""Bounded values in 256 even steps, rounded at random so that changes far below a step still add up."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Format, Part, Spread, Stored

_LARGEST_CODE = 255


@dataclass(frozen=True)
class Linear(Format):
    """Codes 0 to 255 from `low` to `high`. X_q_scale holds these two, so that a checkpoint explains itself.

    Attributes:
        low: the value of code 0.
        high: the value of code 255.
    """

    low: float
    high: float

    suffixes = ("_q", "_q_scale")

    def __post_init__(self) -> None:
        # As the scale holds them, or bounds that were saved would differ from those of the options by rounding.
        for name in ("low", "high"):
            (rounded,) = struct.unpack("f", struct.pack("f", getattr(self, name)))
            object.__setattr__(self, name, rounded)

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {"_q": Part(torch.uint8, tuple(shape), spread=Spread.BY_ROW), "_q_scale": Part(torch.float32, (2,))}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredLinear:
        return StoredLinear(self, tensors, shape)

    def as_saved(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> Linear:
        super().as_saved(tensors, shape)
        low, high = tensors["_q_scale"].tolist()
        if not 0 <= low <= high:
            raise ValueError(f"_q_scale: has the bounds {low} and {high}")
        return Linear(low, high)


class StoredLinear(Stored):
    """A state in the format `Linear`."""

    def __init__(self, linear: Linear, tensors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__(tensors, shape)
        self._low, self._high = linear.low, linear.high

    def read(self, out: Tensor | None = None) -> Tensor:
        codes, scale = self.tensors
        low, high = scale.view(-1, 2, 1, 1).unbind(1)
        share = codes.view(len(codes), self.rows, self.columns).to(torch.float32).div_(_LARGEST_CODE)
        return torch.lerp(low, high, share, out=share)  # In place: of a very large tensor a copy more is felt.

    def write(self, stack: Tensor, dither: Dither) -> None:
        codes, scale = self.tensors
        scale[:, 0].fill_(self._low)
        scale[:, 1].fill_(self._high)
        span = self._high - self._low
        places = stack.flatten(1).sub_(self._low).mul_(_LARGEST_CODE / span if span > 0 else 0.0)
        for part, noise in zip(*dither.in_parts(places)):
            part.add_(noise()).floor_().clamp_(0, _LARGEST_CODE)
        codes.copy_(places.view(codes.shape))

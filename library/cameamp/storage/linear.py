"""Bounded values in 256 even steps, rounded at random so that changes far below a step still add up."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Buffers

_LARGEST_CODE = 255


@dataclass(frozen=True)
class Linear:
    """Codes 0 to 255 from `low` to `high`. X_q_scale holds these two, so that a checkpoint reads itself.

    Attributes:
        low: the value of code 0.
        high: the value of code 255.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        # As the scale holds them, or bounds that were saved would differ from those of the options by rounding.
        for name in ("low", "high"):
            (rounded,) = struct.unpack("f", struct.pack("f", getattr(self, name)))
            object.__setattr__(self, name, rounded)

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}_q", f"{name}_q_scale")

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, dither: Dither) -> Buffers:
        device = dither.device
        scale = torch.empty(n, 2, dtype=torch.float32, device=device)
        buffers = {f"{name}_q": torch.empty(n, *shape, dtype=torch.uint8, device=device), f"{name}_q_scale": scale}
        self.write(name, buffers, torch.full((n, 1, shape.numel()), fill, dtype=torch.float32, device=device), dither)
        return buffers

    def read(self, name: str, buffers: Buffers, rows: int, columns: int, out: Tensor | None = None) -> Tensor:
        low, high = buffers[f"{name}_q_scale"].view(-1, 2, 1, 1).unbind(1)
        share = buffers[f"{name}_q"].view(-1, rows, columns).to(torch.float32).div_(_LARGEST_CODE)
        return torch.lerp(low, high, share)

    def write(self, name: str, buffers: Buffers, stack: Tensor, dither: Dither) -> None:
        scale, codes = buffers[f"{name}_q_scale"], buffers[f"{name}_q"]
        scale[:, 0].fill_(self.low)
        scale[:, 1].fill_(self.high)
        span = self.high - self.low
        places = stack.flatten(1).sub_(self.low).mul_(_LARGEST_CODE / span if span > 0 else 0.0)
        for part, noise in zip(*dither.in_parts(places)):
            part.add_(noise()).floor_().clamp_(0, _LARGEST_CODE)
        codes.copy_(places.view(codes.shape))

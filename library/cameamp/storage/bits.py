"""Yes or no, one bit an element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Buffers


@dataclass(frozen=True)
class Bits:
    """Eight elements in a byte. Byte j of a parameter of 8 k elements holds the elements j, j + k, ..., j + 7 k."""

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}_q",)

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, dither: Dither) -> Buffers:
        byte = 255 if fill else 0
        return {f"{name}_q": torch.full((n, shape.numel() // 8), byte, dtype=torch.uint8, device=dither.device)}

    def read(self, name: str, buffers: Buffers, rows: int, columns: int, out: Tensor | None = None) -> Tensor:
        packed = buffers[f"{name}_q"]
        bits = torch.empty(packed.shape[0], 8, packed.shape[1], dtype=torch.uint8, device=packed.device)
        for place in range(8):
            torch.bitwise_and(packed >> place, 1, out=bits[:, place])
        return bits.view(torch.bool).view(-1, rows, columns)

    def write(self, name: str, buffers: Buffers, stack: Tensor, dither: Dither) -> None:
        packed = buffers[f"{name}_q"]
        bits = stack.view(torch.uint8).view(packed.shape[0], 8, packed.shape[1])
        packed.copy_(bits[:, 0])
        for place in range(1, 8):
            packed.bitwise_or_(bits[:, place] << place)

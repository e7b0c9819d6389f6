"""Yes or no, one bit an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Format, Part, Stored


@dataclass(frozen=True)
class Bits(Format):
    """Eight elements in a byte. Byte j of a parameter of 8 k elements holds the elements j, j + k, ..., j + 7 k.

    If its elements are less than 8 k, what lies beyond them is 0.
    """

    suffixes = ("_q",)

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {"_q": Part(torch.uint8, (-(-shape.numel() // 8),))}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredBits:
        return StoredBits(tensors, shape)


class StoredBits(Stored):
    """A state in the format `Bits`."""

    def read(self, out: Tensor | None = None) -> Tensor:
        (packed,) = self.tensors
        bits = torch.empty(packed.shape[0], 8, packed.shape[1], dtype=torch.uint8, device=packed.device)
        for place in range(8):
            torch.bitwise_and(packed >> place, 1, out=bits[:, place])
        here = bits.view(torch.bool).flatten(1)[:, : self.rows * self.columns]
        return here.reshape(len(packed), self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        (packed,) = self.tensors
        bits = stack.view(torch.uint8).flatten(1)
        missing = packed.shape[1] * 8 - bits.shape[1]
        bits = torch.nn.functional.pad(bits, (0, missing)) if missing else bits
        bits = bits.view(packed.shape[0], 8, packed.shape[1])
        packed.copy_(bits[:, 0])
        for place in range(1, 8):
            packed.bitwise_or_(bits[:, place] << place)

"""Four bits an element: fifteen even levels, as wide as the tensor's root mean square asks for.

For averages that are Gaussian in the main, even levels scaled by the root mean square are within a few percent of the
best that four bits can do (Max, 1960), and cheap to unpack. 0 stays 0, and the few values beyond the last level are cut
there. Others go to their nearest level, except while an average is updated: then the point between two levels where
rounding turns from down to up differs at every step, or changes of less than half a level would be lost each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import AverageFormat, Part, Scaled, StoredAverage

LARGEST = 7  # Levels go from -7 to 7.
BASE = 16

# Distance between levels in root mean squares: for a Gaussian the least squared error of fifteen even levels.
SPACING = 0.3536

# The part of the distance between levels over which the turning point wanders: less than all of it, so that 0 goes to 0
# at every step. Multiples of an irrational number fill it evenly, and of this one also every 5th, 10th or 25th of them.
_WANDERING = 0.75
_IRRATIONAL = math.sqrt(2)

HALF = 0.5  # The turning point that takes values to their nearest level.

# Divided by it, a tensor of zeros keeps them.
SMALLEST_NORM = 1e-37


@dataclass(frozen=True)
class Nibbles(AverageFormat):
    """Two elements in a byte: byte j of a parameter of 2 k elements is level j plus 16 times level j + k."""

    suffixes = ("_q", "_q_scale")

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {"_q": Part(torch.int8, (-(-shape.numel() // 2),)), "_q_scale": Part(torch.float32, (1,))}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredNibbles:
        return StoredNibbles(tensors, shape)


class StoredNibbles(StoredAverage):
    """A state in the format `Nibbles`."""

    def read(self, out: Tensor | None = None) -> Tensor:
        codes, scale = self.tensors
        levels = _unpacked(codes, self.rows * self.columns, out)
        values = levels.mul_(scale) if levels.is_contiguous() else levels * scale
        return values.view(len(codes), self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        codes, scale = self.tensors
        values = stack.flatten(1)
        _pack(values, 1.0, codes, scale, HALF, None, _norms(values), values.shape[1])

    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Scaled:
        codes, scale = self.tensors
        out = torch.empty_like(target, memory_format=torch.contiguous_format) if out is None else out
        values = out.flatten(1)
        # target + (1 - rate) / rate * state: the sum divided by the rate, in one pass over memory.
        levels = _unpacked(codes, values.shape[1], out)
        torch.addcmul(target.flatten(1), levels, scale, value=(1 - rate) / rate, out=values)
        room = None if scratch is None else scratch.flatten(1)
        norms, count = self._new_norms(values, rate)
        _pack(values, rate, codes, scale, turning_point(dither.step), room, norms, count)
        return Scaled(out, rate)

    def _new_norms(self, values: Tensor, rate: float) -> tuple[Tensor, int]:
        """The norm of each tensor, (tensors, 1), of which `values` are the new ones in units of the rate; its size."""
        return _norms(values), values.shape[1]


def turning_point(step: int) -> float:
    """How far above a level, as a part of the distance to the next, values of a step begin to be rounded up."""
    return HALF + _WANDERING * (_IRRATIONAL * step % 1 - 0.5)


def _unpacked(codes: Tensor, count: int, out: Tensor | None) -> Tensor:
    """The levels that some codes stand for, (tensors, count) float32; in the memory of `out` where they fit into it."""
    n, half = codes.shape
    if out is None or count != 2 * half:
        out = torch.empty(n, 2, half, dtype=torch.float32, device=codes.device)
    pairs = out.view(n, 2, half)
    low, high = pairs.unbind(1)
    low.copy_(codes)
    torch.mul(low, 1 / BASE, out=high).round_()
    low.sub_(high, alpha=BASE)
    return pairs.flatten(1)[:, :count]


def pack(levels: Tensor, codes: Tensor) -> None:
    """Write levels, (tensors, elements) int8 and 7 more than they are, in codes that may have room for more."""
    half = codes.shape[1]
    if levels.shape[1] != 2 * half:
        levels = torch.nn.functional.pad(levels, (0, 2 * half - levels.shape[1]), value=LARGEST)
    # What overflows in the sum comes back in the difference.
    torch.add(levels[:, :half], levels[:, half:], alpha=BASE, out=codes).sub_(LARGEST * (1 + BASE))


def repack(codes: Tensor, count: int, out: Tensor) -> None:
    """Write tensors of `count` elements, (tensors, bytes), as so many others of the same elements in their order."""
    levels = _unpacked(codes, count, None).reshape(len(out), len(codes) * count // max(len(out), 1))
    pack((levels + LARGEST).to(torch.int8), out)


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return norms


def _pack(
    values: Tensor,
    unit: float,
    codes: Tensor,
    scale: Tensor,
    turning_point: float,
    scratch: Tensor | None,
    norms: Tensor,
    count: int,
) -> None:
    """Write the codes of unit * values, and the distance between their levels.

    Args:
        values: (tensors, elements).
        turning_point: where between two levels rounding turns from down to up; 1/2 for the nearest.
        scratch: memory to compute in, of the values' shape; allocated where None.
        norms: those of whole tensors, (tensors, 1).
        count: how many elements these have.
    """
    alone = len(values) == 1
    spacing = SPACING / math.sqrt(max(count, 1))
    scale.copy_(norms).clamp_min_(SMALLEST_NORM)
    # Adding what is above the turning point, and cutting, rounds. A row of it is added in the pass that divides; for a
    # single tensor that row is as large as the result, and becomes it.
    row = values.new_empty(1, values.shape[1]) if scratch is None or not alone else scratch
    above = row.fill_(LARGEST + 1 - turning_point)
    levels = torch.addcdiv(above, values, scale, value=1 / spacing, out=above if alone else scratch)
    levels.clamp_(0, 2 * LARGEST + 0.5)
    # As signed bytes: CPUs take several times as long to make unsigned ones.
    pack(levels.to(torch.int8), codes)
    scale.mul_(spacing * unit)

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
        levels = _levels(codes, self.rows * self.columns, out)
        return (levels.mul_(scale) if levels.is_contiguous() else levels * scale).view(-1, self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        codes, scale = self.tensors
        _pack(stack.flatten(1), 1.0, codes, scale, HALF, None)

    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Scaled:
        codes, scale = self.tensors
        out = torch.empty_like(target, memory_format=torch.contiguous_format) if out is None else out
        values = out.flatten(1)
        # target + (1 - rate) / rate * state: the sum divided by the rate, in one pass over memory.
        levels = _levels(codes, values.shape[1], out)
        torch.addcmul(target.flatten(1), levels, scale, value=(1 - rate) / rate, out=values)
        room = None if scratch is None else scratch.flatten(1)
        _pack(values, rate, codes, scale, turning_point(dither.step), room)
        return Scaled(out, rate)


def turning_point(step: int) -> float:
    """How far above a level, as a part of the distance to the next, values of a step begin to be rounded up."""
    return HALF + _WANDERING * (_IRRATIONAL * step % 1 - 0.5)


def _levels(codes: Tensor, count: int, out: Tensor | None) -> Tensor:
    """The levels that some codes stand for, (tensors, count) float32; in the memory of `out` where they fit into it."""
    n, half = codes.shape
    if out is None or count % 2:
        out = torch.empty(n, 2, half, dtype=torch.float32, device=codes.device)
    pairs = out.view(n, 2, half)
    low, high = pairs.unbind(1)
    low.copy_(codes)
    torch.mul(low, 1 / BASE, out=high).round_()
    low.sub_(high, alpha=BASE)
    return pairs.flatten(1)[:, :count]


def _pack(
    values: Tensor, unit: float, codes: Tensor, scale: Tensor, turning_point: float, scratch: Tensor | None
) -> None:
    """Write the codes of unit * values, and the distance between their levels.

    Args:
        values: (tensors, elements).
        turning_point: where between two levels rounding turns from down to up; 1/2 for the nearest.
        scratch: memory to compute in, of the values' shape; allocated where None.
    """
    count, half = values.shape[1], codes.shape[1]
    alone = len(values) == 1
    spacing = SPACING / math.sqrt(count)
    torch.linalg.vector_norm(values, dim=1, keepdim=True, out=scale).clamp_min_(SMALLEST_NORM)
    # Adding what is above the turning point, and cutting, rounds. A row of it is added in the pass that divides; for a
    # single tensor that row is as large as the result, and becomes it.
    row = values.new_empty(1, count) if scratch is None or not alone else scratch
    above = row.fill_(LARGEST + 1 - turning_point)
    levels = torch.addcdiv(above, values, scale, value=1 / spacing, out=above if alone else scratch)
    levels.clamp_(0, 2 * LARGEST + 0.5)
    # As signed bytes: CPUs take several times as long to make unsigned ones.
    whole = levels.to(torch.int8)
    high = whole[:, half:] if count == 2 * half else torch.nn.functional.pad(whole[:, half:], (0, 1), value=LARGEST)
    # What overflows in the sum comes back in the difference.
    torch.add(whole[:, :half], high, alpha=BASE, out=codes).sub_(LARGEST * (1 + BASE))
    scale.mul_(spacing * unit)

"""Four bits an element: fifteen even levels, as wide as the tensor's root mean square asks for.

For averages that are Gaussian in the main, even levels scaled by the root mean square are within a few percent of the
best that four bits can do (Max, 1960), and cheap to unpack. 0 stays 0, and the few values beyond the last level are cut
there. Others go to their nearest level, but in a momentum that moves: there the point between two levels where rounding
turns from down to up is another at every step, or moves of less than half a level would be lost each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Buffers

_MIDDLE = 7  # the code of 0; codes go from 0 to 14

# Distance between levels in root mean squares: for a Gaussian the least squared error of fifteen even levels.
_SPACING = 0.3536

# The part of the distance between levels over which the turning point wanders: less than all of it, so that 0 goes to 0
# at every step. Multiples of an irrational number fill it evenly, and of this one also every 5th, 10th or 25th of them.
_WANDERING = 0.75
_IRRATIONAL = math.sqrt(2)

_HALF = 0.5  # The turning point that takes values to their nearest level.

# Below it only the zeros of a tensor that is all zeros are divided.
_SMALLEST_SCALE = 1e-37


@dataclass(frozen=True)
class Nibbles:
    """Two elements in a byte: byte j of a parameter of 2 k elements holds the elements j and j + k."""

    def keys(self, name: str) -> tuple[str, ...]:
        return (f"{name}_q", f"{name}_q_scale")

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, dither: Dither) -> Buffers:
        if fill != 0:
            raise ValueError(f"a state in nibbles starts at 0, not {fill}")
        half = -(-shape.numel() // 2)
        codes = torch.full((n, half), _MIDDLE * 17, dtype=torch.uint8, device=dither.device)
        return {
            f"{name}_q": codes,
            f"{name}_q_scale": torch.zeros(n, 1, dtype=torch.float32, device=dither.device),
        }

    def read(self, name: str, buffers: Buffers, rows: int, columns: int, out: Tensor | None = None) -> Tensor:
        return _unpacked(buffers[f"{name}_q"], buffers[f"{name}_q_scale"], rows, columns, out)

    def write(self, name: str, buffers: Buffers, stack: Tensor, dither: Dither) -> None:
        _pack(stack, buffers[f"{name}_q"], buffers[f"{name}_q_scale"], _HALF, stack)

    def move(
        self,
        name: str,
        buffers: Buffers,
        target: Tensor,
        rate: float,
        dither: Dither,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:
        codes, scale = buffers[f"{name}_q"], buffers[f"{name}_q_scale"]
        rows, columns = target.shape[1:]
        moved = _unpacked(codes, scale * (1 - rate), rows, columns, out).add_(target, alpha=rate)
        _pack(moved, codes, scale, _turning_point(dither.step), scratch)
        return moved


def _turning_point(step: int) -> float:
    """How far above a level, as a part of the distance to the next, values of a step begin to be rounded up."""
    return _HALF + _WANDERING * (_IRRATIONAL * step % 1 - 0.5)


def _unpacked(codes: Tensor, scale: Tensor, rows: int, columns: int, out: Tensor | None) -> Tensor:
    """(tensors, rows, columns) of codes and the distance between levels; in `out` where given."""
    count, size = rows * columns, (len(codes), 2, codes.shape[1])
    if out is None:
        out = torch.empty(len(codes), rows, columns, dtype=torch.float32, device=codes.device)
    halves = torch.empty(size, dtype=torch.uint8, device=codes.device)
    torch.bitwise_and(codes, 15, out=halves[:, 0])
    torch.bitwise_right_shift(codes, 4, out=halves[:, 1])
    levels = halves.view(torch.int8).sub_(_MIDDLE)
    if count % 2 == 0:
        out.view(size).copy_(levels)
    else:
        out.view(len(codes), count).copy_(levels.flatten(1)[:, :count])
    return out.mul_(scale.unsqueeze(2))


def _pack(stack: Tensor, codes: Tensor, scale: Tensor, turning_point: float, scratch: Tensor | None) -> None:
    """Write a stack's codes and the distance between their levels.

    Args:
        stack: (tensors, rows, columns).
        turning_point: where between two levels rounding turns from down to up; 1/2 for the nearest.
        scratch: memory to compute in, which may be the stack itself; allocated where None.
    """
    values = stack.flatten(1)
    count, half = values.shape[1], codes.shape[1]
    torch.linalg.vector_norm(values, dim=1, keepdim=True, out=scale)
    scale.mul_(_SPACING / math.sqrt(count))
    # Adding what is above the turning point, and cutting, rounds. A tensor of zeros keeps a scale of 0.
    levels = torch.div(values, scale.clamp_min(_SMALLEST_SCALE), out=None if scratch is None else scratch.flatten(1))
    # As signed bytes: CPUs take several times as long to make unsigned ones.
    whole = levels.add_(_MIDDLE + 1 - turning_point).clamp_(0, 2 * _MIDDLE + 0.5).to(torch.int8)
    high = whole[:, half:] if count == 2 * half else torch.nn.functional.pad(whole[:, half:], (0, 1))
    # The sum overflows into the sign, which is the byte's highest bit.
    torch.add(whole[:, :half], high, alpha=16, out=codes.view(torch.int8))

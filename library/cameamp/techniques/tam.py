"""Torque-Aware Momentum (arXiv 2412.18790): a gradient that turns away from the momentum moves it less."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

# The paper's decay, of the momentum and of the smoothed correlation alike.
DECAY = 0.9

_SMALLEST_NORM = 1e-12

# Of a larger stack, which is a single tensor, so many elements at a time: what lies in between takes less memory so.
_PART = 8 * 1024 * 1024


def torque_aware_momentum_(
    exp_avg: Tensor,
    s: Tensor,
    scaled_grad: Tensor,
    eps: float,
    scratch: Tensor | None = None,
    drive: Tensor | None = None,
) -> Tensor:
    """Update the momentum by the gradient, damped where the two disagree.

    Args:
        exp_avg: momentum, (tensors, rows, columns); updated.
        s: smoothed correlation of momentum and gradient; updated.
        scaled_grad: scaled gradient; overwritten by the result.
        eps: floor of the damping.
        scratch: memory to compute in, of s's shape; allocated where None.
        drive: what moves the momentum, where that is not the scaled gradient itself.

    Returns:
        The residual: how far the scaled gradient lies from the new momentum.
    """
    drive = scaled_grad if drive is None else drive
    norms = _column_norms(exp_avg, scratch).mul_(_column_norms(drive, scratch))
    for momentum, smoothed, part, room in _by_rows(exp_avg, s, drive, scratch):
        smoothed.lerp_(torch.mul(momentum, part, out=room).div_(norms), 1 - DECAY)
        momentum.mul_(DECAY).addcmul_(torch.add(smoothed, 1 + 2 * eps, out=room), part, value=0.5)
    return scaled_grad.sub_(exp_avg)


def _column_norms(x: Tensor, scratch: Tensor | None) -> Tensor:
    # Squares, then a sum: several times faster on a CPU than a strided vector_norm.
    total, *others = [torch.mul(part, part, out=room).sum(dim=1, keepdim=True) for part, room in _by_rows(x, scratch)]
    for more in others:
        total.add_(more)
    return total.sqrt_().clamp_min_(_SMALLEST_NORM)


def _by_rows(first: Tensor, *others: Tensor | None) -> list[tuple[Any, ...]]:
    """Stacks, (tensors, rows, columns), by some rows at a time where they are large; None stays None in each part."""
    stacks = (first, *others)
    if first.numel() <= _PART:
        return [stacks]
    rows = max(1, _PART // (first.shape[0] * first.shape[2]))
    return list(zip(*(repeat(None) if x is None else x.split(rows, dim=1) for x in stacks)))

"""Torque-Aware Momentum (arXiv 2412.18790): a gradient that turns away from the momentum moves it less."""

from __future__ import annotations

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
    for momentum, smoothed, part, room in zip(*map(_row_parts, (exp_avg, s, drive)), _rooms(exp_avg, scratch)):
        smoothed.lerp_(torch.mul(momentum, part, out=room).div_(norms), 1 - DECAY)
        momentum.mul_(DECAY).addcmul_(torch.add(smoothed, 1 + 2 * eps, out=room), part, value=0.5)
    return scaled_grad.sub_(exp_avg)


def _column_norms(x: Tensor, scratch: Tensor | None) -> Tensor:
    # Squares, then a sum: several times faster on a CPU than a strided vector_norm.
    total, *others = [
        torch.mul(part, part, out=room).sum(dim=1, keepdim=True)
        for part, room in zip(_row_parts(x), _rooms(x, scratch))
    ]
    for more in others:
        total.add_(more)
    return total.sqrt_().clamp_min_(_SMALLEST_NORM)


def _row_parts(x: Tensor) -> tuple[Tensor, ...]:
    """A stack, (tensors, rows, columns), by some rows at a time where it is large."""
    if x.numel() <= _PART:
        return (x,)
    return x.split(max(1, _PART // (x.shape[0] * x.shape[2])), dim=1)


def _rooms(x: Tensor, scratch: Tensor | None) -> tuple[Tensor | None, ...]:
    """For each part of `x`, memory to compute in; None where it is to be allocated."""
    return (None,) * len(_row_parts(x)) if scratch is None else _row_parts(scratch)

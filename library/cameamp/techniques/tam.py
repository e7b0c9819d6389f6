"""Torque-Aware Momentum, TAM (arXiv 2412.18790): the more a gradient turns from the momentum, the less it counts."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .sums import OF_WHOLE_TENSORS, Sums

# The paper's decay rate, both of the momentum and of the smoothed correlation.
DECAY = 0.9

SMALLEST_NORM = 1e-12

# A larger stack is always a single tensor. It is processed in parts of this many elements, which bounds the memory for
# intermediate results.
_PART = 8 * 1024 * 1024


def torque_aware_momentum_(
    exp_avg: Tensor,
    s: Tensor,
    scaled_grad: Tensor,
    eps: float,
    scratch: Tensor | None = None,
    drive: Tensor | None = None,
    sums: Sums = OF_WHOLE_TENSORS,
) -> Tensor:
    """Update the momentum with a damped gradient: damped more, the more the two have disagreed lately.

    In the paper, with the gradient g, the momentum m, and one smoothed correlation s for a whole parameter:

        s = gamma * s + (1 - gamma) * cos(g, m)
        d = (1 + s) / 2
        m = beta * m + (eps + d) * g

    What differs here: s has one entry per element instead of one per parameter, each the element's own share of the
    cosine of its column. With colnorm the norm of a column, over its rows, 1e-12 at least, and both rates 0.9:

        s       = 0.9 * s + 0.1 * (exp_avg / colnorm(exp_avg)) * (drive / colnorm(drive))
        exp_avg = 0.9 * exp_avg + ((1 + s) / 2 + eps) * drive

    Args:
        exp_avg: momentum m, (tensors, rows, columns); updated.
        s: smoothed correlation of momentum and drive, a share of a cosine, so from -1 to 1; updated.
        scaled_grad: scaled gradient sg; overwritten by the result.
        eps: smallest weight of the gradient.
        scratch: memory to compute in, of s's shape; allocated if None.
        drive: what the momentum averages; the scaled gradient if None.
        sums: adds up over whole tensors.

    Returns:
        The residual sg - exp_avg: how far the scaled gradient lies from the new momentum.

    Example:
        The first column agrees with its momentum and gets more than half of its gradient, the second disagrees.

        >>> momentum, s = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
        >>> residual = torque_aware_momentum_(momentum, s, torch.tensor([[[1.0, -1.0]]]), eps=0.0)
        >>> [round(x, 3) for x in s.flatten().tolist()]
        [0.1, -0.1]
        >>> [round(x, 3) for x in momentum.flatten().tolist()]
        [1.45, 0.45]
        >>> [round(x, 3) for x in residual.flatten().tolist()]
        [-0.45, -1.45]
    """
    drive = scaled_grad if drive is None else drive
    squares = sums.over_rows(_column_squares(exp_avg, scratch), _column_squares(drive, scratch))
    norms, of_drive = (total.sqrt_().clamp_min_(SMALLEST_NORM) for total in squares)
    norms.mul_(of_drive)
    for momentum, smoothed, part, room in _by_rows(exp_avg, s, drive, scratch):
        smoothed.lerp_(torch.mul(momentum, part, out=room).div_(norms), 1 - DECAY)
        momentum.mul_(DECAY).addcmul_(torch.add(smoothed, 1 + 2 * eps, out=room), part, value=0.5)
    return scaled_grad.sub_(exp_avg)


def _column_squares(x: Tensor, scratch: Tensor | None) -> Tensor:
    # Squares, then a sum: several times faster on a CPU than a strided vector_norm.
    total, *others = [torch.mul(part, part, out=room).sum(dim=1, keepdim=True) for part, room in _by_rows(x, scratch)]
    for more in others:
        total.add_(more)
    return total


def _by_rows(first: Tensor, *others: Tensor | None) -> list[tuple[Any, ...]]:
    """Split stacks (tensors, rows, columns) into parts of some rows each if they are large; None stays None."""
    stacks = (first, *others)
    if first.numel() <= _PART:
        return [stacks]
    rows = max(1, _PART // (first.shape[0] * first.shape[2]))
    return list(zip(*(repeat(None) if x is None else x.split(rows, dim=1) for x in stacks)))

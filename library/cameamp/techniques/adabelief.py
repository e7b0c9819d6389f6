"""AdaBelief (arXiv 2010.07468): long steps where the gradient is as predicted, short ones where it surprises."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bias_correction(beta3: float, step: int) -> float:
    """The root of what a mean squared residual that started at 0 has seen by a step: sqrt(1 - beta3^step)."""
    return math.sqrt(1 - beta3**step)


def divide_by_belief_(
    exp_avg: Tensor,
    exp_avg_res: Tensor,
    residual: Tensor,
    beta3: float,
    eps: float,
    correction: float | Tensor | None = None,
) -> Tensor:
    """Update the mean squared residual and divide the momentum by its root.

    Args:
        exp_avg: momentum, (tensors, rows, columns).
        exp_avg_res: running mean of the squared residual + eps; updated.
        residual: how far the gradient lies from what was predicted; overwritten by the result.
        beta3: decay rate of the residual.
        eps: its floor.
        correction: from `bias_correction`; None for none, which makes the first steps longer.

    Returns:
        The update.
    """
    # Towards the floor, then the square on top: one pass over memory less than scaling and adding a number.
    exp_avg_res.lerp_(exp_avg_res.new_full((), eps), 1 - beta3).addcmul_(residual, residual, value=1 - beta3)
    update = torch.rsqrt(exp_avg_res, out=residual).mul_(exp_avg)
    return update if correction is None else update.mul_(correction)

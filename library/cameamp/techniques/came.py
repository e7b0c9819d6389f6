"""CAME's scaling by the second moment (arXiv 2307.02047), here with a full moment instead of its two factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def scale_by_second_moment_(
    grad: Tensor, exp_avg_sq: Tensor, beta2: float, eps: float, clip_threshold: float, out: Tensor | None = None
) -> Tensor:
    """Update the second moment, divide the gradient by its root, and bound each tensor's root mean square.

    Args:
        grad: regularized gradient, (tensors, rows, columns).
        exp_avg_sq: running mean of grad^2 + eps; updated.
        beta2: its decay rate.
        eps: its floor.
        clip_threshold: bound of the root mean square of one tensor's result.
        out: memory for the result, of grad's shape; allocated where None.

    Returns:
        The scaled gradient.
    """
    # Towards the floor, then the square on top: one pass over memory less than scaling and adding a number.
    exp_avg_sq.lerp_(exp_avg_sq.new_full((), eps), 1 - beta2).addcmul_(grad, grad, value=1 - beta2)
    scaled = torch.rsqrt(exp_avg_sq, out=out).mul_(grad)
    norm = torch.linalg.vector_norm(scaled.flatten(1), dim=1)
    excess = norm.mul_(1 / (math.sqrt(scaled[0].numel()) * clip_threshold)).clamp_min_(1.0)
    return scaled.mul_(excess.reciprocal_().view(-1, 1, 1))


def growing_bound(step: int) -> float:
    """The bound of AdaBelief's clip at a step: step^(1/4)."""
    return step**0.25


def clip_elements(grad: Tensor, bound: Any, out: Tensor | None = None) -> Tensor:
    """AdaBelief's clip, used instead where CAME is off: each element within `bound`, a number or 0-d tensor, of 0."""
    return torch.clamp(grad, -bound, bound, out=out)

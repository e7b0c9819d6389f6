"""Adaptive Weight Decay (arXiv 1907.08931): tensors with large gradients decay more, quiet ones less."""

from __future__ import annotations

import torch
from torch import Tensor

_ALPHA = 4.0

# Past this float32 rounds the sigmoid to 0 or 1, and the strength out of its open interval.
_SATURATION = 16.0


def decay_strengths(means: Tensor, deviations: Tensor, counts: Tensor) -> Tensor:
    """Strength of the decay of each tensor of a parameter group.

    Args:
        means: mean |g| of each tensor of the group, 1-d.
        deviations: sum of squared deviations of |g| from that mean, 1-d.
        counts: number of elements of each tensor, 1-d.

    Returns:
        theta = 2 / (1 + exp(-4 z)) in (0, 2), 1-d, where z is how many standard deviations of the group's |g| the
        tensor's mean lies above the group's; 0 where all magnitudes are equal.
    """
    total = counts.sum()
    mean = (means * counts).sum() / total
    # Chan's rule: spread within the tensors plus spread between them, without the cancellation of E[x^2] - E[x]^2.
    variance = (deviations + counts * (means - mean).square()).sum() / total
    z = torch.where(variance > 0, (means - mean) * variance.rsqrt(), 0.0)
    return 2 * torch.sigmoid((_ALPHA * z).clamp_(-_SATURATION, _SATURATION))


def add_decay_(update: Tensor, p: Tensor, strength: Tensor, weight_decay: float) -> Tensor:
    """Let the update also shrink the weights: p - lr * (u + decay * p) is p * (1 - lr * decay) - lr * u.

    Args:
        update: the update, (tensors, rows, columns); updated.
        p: the weights.
        strength: theta of each tensor, (tensors,).
        weight_decay: the group's weight decay.

    Returns:
        `update`.
    """
    return update.addcmul_(p, strength.view(-1, 1, 1), value=weight_decay)

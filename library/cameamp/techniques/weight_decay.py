"""Adaptive Weight Decay (arXiv 1907.08931): tensors with large gradients decay more, those with small ones less."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 4.0

# Beyond this float32 rounds the sigmoid to 0 or 1, and the strength out of its open interval.
SATURATION = 16.0


def decay_strengths(means: Tensor, deviations: Tensor, counts: Tensor) -> Tensor:
    """How strongly each tensor of a parameter group decays.

    In the paper, with the magnitude |g| of each gradient element, standardized within its layer:

        z     = (|g| - mean of |g|) / standard deviation of |g|
        theta = 2 / (1 + exp(-alpha * z))

    What differs here: z compares the mean |g| of a tensor with its parameter group instead of an element with its
    layer, so that a tensor has one theta. alpha is 4, as in the paper. z is 0 if all magnitudes are equal.

    Args:
        means: mean |g| of each tensor of the group, (tensors,).
        deviations: sum of squared deviations of |g| from that mean, (tensors,).
        counts: number of elements of each tensor, (tensors,).

    Returns:
        theta, (tensors,), a plain number between 0 and 2.

    Example:
        Two tensors of one element each, one deviation below and one above the mean of the group:

        >>> theta = decay_strengths(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.ones(2))
        >>> [round(x, 3) for x in theta.tolist()]
        [0.036, 1.964]
        >>> decay_strengths(torch.tensor([2.0, 2.0]), torch.zeros(2), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return strengths_within(means, *mean_and_variance(means, deviations, counts))


def mean_and_variance(means: Tensor, deviations: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of |g| over a parameter group, 0-d each; arguments as of `decay_strengths`.

    Example:
        >>> mean, variance = mean_and_variance(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.ones(2))
        >>> mean.item(), variance.item()
        (2.0, 1.0)
    """
    total = counts.sum()
    mean = (means * counts).sum() / total
    # Chan's rule: spread within the tensors plus spread between them, without the cancellation of E[x^2] - E[x]^2.
    return mean, (deviations + counts * (means - mean).square()).sum() / total


def strengths_within(means: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """As `decay_strengths`, in a group whose mean and variance of |g| are known.

    Args:
        means: mean |g| of each tensor, (tensors,).
        mean: mean |g| of the group, 0-d.
        variance: variance of |g| in the group, 0-d.

    Returns:
        theta, (tensors,).
    """
    z = torch.where(variance > 0, (means - mean) * variance.rsqrt(), 0.0)
    return 2 * torch.sigmoid((ALPHA * z).clamp_(-SATURATION, SATURATION))


def add_decay_(update: Tensor, p: Tensor, strength: Tensor, weight_decay: float) -> Tensor:
    """Add the decay of the weights to the update.

    With the paper's decay coefficient weight_decay and the strength theta of each tensor:

        u = u + weight_decay * theta * p

    Because p - lr * u follows, this is p * (1 - lr * weight_decay * theta) - lr * u with the u from before.

    Args:
        update: the update u, (tensors, rows, columns); updated.
        p: the weights, of the same shape.
        strength: theta of each tensor, (tensors,), from `decay_strengths`.
        weight_decay: the group's weight decay.

    Returns:
        `update`.

    Example:
        >>> add_decay_(torch.zeros(1, 1, 2), torch.tensor([[[1.0, -2.0]]]), torch.tensor([1.5]), 0.5).tolist()
        [[[0.75, -1.5]]]
    """
    return update.addcmul_(p, strength.view(-1, 1, 1), value=weight_decay)

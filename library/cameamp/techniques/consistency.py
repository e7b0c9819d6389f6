"""Consistency Momentum (arXiv 2404.07946): a momentum whose memory shortens as training settles."""

from __future__ import annotations

from torch import Tensor

_SMALLEST_RATE = 0.4


def decay_rate(beta1: float, beta1_decay: float, step: int) -> float:
    """The momentum's decay rate at a step: beta1 * beta1_decay^step, and never below 0.4."""
    return max(beta1 * beta1_decay**step, _SMALLEST_RATE)


def consistency_momentum_(
    exp_avg: Tensor, scaled_grad: Tensor, rate: float | Tensor, beta1: float, drive: Tensor | None = None
) -> Tensor:
    """Update the momentum with the decay rate of this step.

    Args:
        exp_avg: momentum, (tensors, rows, columns); updated.
        scaled_grad: scaled gradient; overwritten by the result.
        rate: decay rate of this step, from `decay_rate`.
        beta1: decay rate at the start.
        drive: what moves the momentum, where that is not the scaled gradient itself.

    Returns:
        The residual: how far the scaled gradient lies from beta1 * momentum + (1 - beta1) * drive.
    """
    if drive is not None:
        exp_avg.lerp_(drive, 1 - rate)
        return scaled_grad.sub_(exp_avg, alpha=beta1).sub_(drive, alpha=1 - beta1)
    exp_avg.lerp_(scaled_grad, 1 - rate)
    # gradient - (beta1 * momentum + (1 - beta1) * gradient), without computing that average.
    return scaled_grad.sub_(exp_avg).mul_(beta1)

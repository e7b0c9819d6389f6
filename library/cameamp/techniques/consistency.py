"""Consistency Momentum (arXiv 2404.07946): a momentum whose memory shortens in the course of training."""

from __future__ import annotations

from torch import Tensor

_SMALLEST_RATE = 0.4


def decay_rate(beta1: float, beta1_decay: float, step: int) -> float:
    """The decay rate of the momentum at step t, counted from 1: b1_t = max(beta1 * beta1_decay^t, 0.4).

    The floor of 0.4 keeps some average of the gradients at the end of a long run.

    Example:
        >>> [round(decay_rate(0.8, 0.9995, step), 3) for step in (1, 700, 1386, 5000)]
        [0.8, 0.564, 0.4, 0.4]
    """
    return max(beta1 * beta1_decay**step, _SMALLEST_RATE)


def consistency_momentum_(
    exp_avg: Tensor, scaled_grad: Tensor, rate: float, beta1: float, drive: Tensor | None = None
) -> Tensor:
    """Update the momentum with the decay rate of this step.

    In the paper the momentum m averages the gradient g at a rate that falls from step to step:

        m = b_t * m + (1 - b_t) * g

    What differs here: the rate falls exponentially to a floor (see `decay_rate`) instead of along the paper's own
    schedule, and no higher learning rate makes up for it. What AdaBelief compares the gradient with is `bar`, in which
    b1 is the decay rate at the start:

        exp_avg = b1_t * exp_avg + (1 - b1_t) * drive
        bar     = b1 * exp_avg + (1 - b1) * drive

    Args:
        exp_avg: momentum m, (tensors, rows, columns); updated.
        scaled_grad: scaled gradient sg; overwritten by the result.
        rate: decay rate b1_t of this step, from `decay_rate`.
        beta1: decay rate b1 at the start.
        drive: what the momentum averages; the scaled gradient if None.

    Returns:
        The residual sg - bar.

    Example:
        >>> import torch
        >>> momentum = torch.tensor([[[1.0, -1.0]]])
        >>> residual = consistency_momentum_(momentum, torch.tensor([[[1.0, 1.0]]]), rate=0.5, beta1=0.8)
        >>> [round(x, 3) for x in momentum.flatten().tolist()]
        [1.0, 0.0]
        >>> [round(x, 3) for x in residual.flatten().tolist()]
        [0.0, 0.8]
    """
    if drive is not None:
        exp_avg.lerp_(drive, 1 - rate)
        return scaled_grad.sub_(exp_avg, alpha=beta1).sub_(drive, alpha=1 - beta1)
    exp_avg.lerp_(scaled_grad, 1 - rate)
    # gradient - (beta1 * momentum + (1 - beta1) * gradient), without computing that average.
    return scaled_grad.sub_(exp_avg).mul_(beta1)

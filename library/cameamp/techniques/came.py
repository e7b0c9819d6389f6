"""CAME's scaling by the second moment (arXiv 2307.02047), here with the full moment instead of its two factors.

If CAME is off, a clip with the growing bound of ADOPT (arXiv 2411.02853) takes its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sums import OF_WHOLE_TENSORS, Sums


def scale_by_second_moment_(
    grad: Tensor,
    exp_avg_sq: Tensor,
    beta2: float,
    eps: float,
    clip_threshold: float,
    out: Tensor | None = None,
    sums: Sums = OF_WHOLE_TENSORS,
) -> Tensor:
    """Update the second moment, divide the gradient by its root, and bound the root mean square of each tensor.

    In the paper, with the gradient g, the bound d, and the second moment V as the product of the row means R and the
    column means C:

        R, C  = running means, at rate b2, of the row and column means of g^2 + eps
        V     = R C / mean(R)
        u     = g / sqrt(V)
        u_hat = u / max(1, RMS(u) / d)

    What differs here: V is stored in full, so that each element is divided by its own second moment. CAME's second
    half, the division by the confidence in the update, is in `adabelief.py`.

        exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * (grad^2 + eps)
        sg         = grad / sqrt(exp_avg_sq)
        sg         = sg / max(1, RMS(sg) / clip_threshold)

    Args:
        grad: regularized gradient, (tensors, rows, columns).
        exp_avg_sq: second moment V, in the unit of the gradient squared; updated.
        beta2: decay rate b2 of the second moment.
        eps: floor of the second moment.
        clip_threshold: bound d of the root mean square (RMS) of one tensor of the result.
        out: memory for the result, of grad's shape; allocated if None.
        sums: adds up over whole tensors.

    Returns:
        The scaled gradient sg, a plain number.

    Example:
        At the first step every element would be 1 / sqrt(1 - b2) = 10 times its sign; the bound makes that 1.

        >>> moment = torch.zeros(1, 1, 2)
        >>> sg = scale_by_second_moment_(torch.tensor([[[0.5, -2.0]]]), moment, 0.99, 1e-30, clip_threshold=1.0)
        >>> [round(x, 4) for x in sg.flatten().tolist()]
        [1.0, -1.0]
        >>> [round(x, 4) for x in moment.flatten().tolist()]
        [0.0025, 0.04]
    """
    # Towards the floor, then the square on top: one pass over memory less than scaling and adding a number.
    exp_avg_sq.lerp_(exp_avg_sq.new_full((), eps), 1 - beta2).addcmul_(grad, grad, value=1 - beta2)
    scaled = torch.rsqrt(exp_avg_sq, out=out).mul_(grad)
    factor = bounding_factor_(sums.norms(scaled), sums.numel(scaled), clip_threshold)
    sums.scaled_by(factor)
    return scaled.mul_(factor.view(-1, 1, 1))


def bounding_factor_(norms: Tensor, numel: int, clip_threshold: float) -> Tensor:
    """What each tensor of so many elements is multiplied by, (tensors,), so that its root mean square stays in bounds.

    Args:
        norms: of the tensors, (tensors,); overwritten.
        numel: elements of each.
        clip_threshold: bound of the root mean square.
    """
    return norms.mul_(1 / (math.sqrt(numel) * clip_threshold)).clamp_min_(1.0).reciprocal_()


def growing_bound(step: int) -> float:
    """The bound of `clip_elements` at step t, counted from 1: t^(1/4), as in ADOPT.

    Example:
        >>> [growing_bound(step) for step in (1, 16, 81)]
        [1.0, 2.0, 3.0]
    """
    return float(step**0.25)


def clip_elements(grad: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """Clip each element of the gradient, in place of the scaling if CAME is off.

        sg = max(-bound, min(grad, bound))

    Args:
        grad: regularized gradient, (tensors, rows, columns).
        bound: largest magnitude, from `growing_bound`.
        out: memory for the result, of grad's shape; allocated if None.

    Returns:
        The clipped gradient, in the unit of grad.

    Example:
        >>> clip_elements(torch.tensor([[[0.5, -3.0]]]), bound=2.0).tolist()
        [[[0.5, -2.0]]]
    """
    return torch.clamp(grad, -bound, bound, out=out)

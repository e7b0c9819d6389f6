"""Grams (arXiv 2412.17107): the momentum gives the length of the step, the gradient its direction."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_share(beta1_decay: float, step: int) -> float:
    """The gradient's share a in the direction at step t, counted from 1: a = beta1_decay^t.

    Example:
        >>> [round(gradient_share(0.9995, step), 3) for step in (1, 500, 1386)]
        [1.0, 0.779, 0.5]
    """
    return beta1_decay**step


def turn_to_gradient_(update: Tensor, direction: Tensor, share: float, scratch: Tensor | None = None) -> Tensor:
    """Turn the update towards the gradient, element by element.

    In the paper, with the update u of any optimizer and the gradient g:

        u = |u| * sign(g)

    What differs here: this result is blended with the update itself, in a share a that fades with the steps.

        u = a * |u| * sign(grad) + (1 - a) * u

    Args:
        update: the update u, (tensors, rows, columns); overwritten by the result.
        direction: sign(grad), of the same shape: -1, 0 or 1.
        share: the gradient's share a, from `gradient_share`.
        scratch: memory to compute in, of update's shape; allocated if None.

    Returns:
        The blended update, in the unit of `update`. No element grows.

    Example:
        >>> turn_to_gradient_(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[1.0, 1.0]]]), share=0.75).tolist()
        [[[2.0, 1.0]]]
    """
    return update.lerp_(torch.abs(update, out=scratch).mul_(direction), share)

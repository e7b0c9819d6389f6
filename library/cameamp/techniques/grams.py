"""Grams (arXiv 2412.17107): the momentum gives the length of the step, the gradient its direction."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_share(beta1_decay: float, step: int) -> float:
    """How much of the direction is the gradient's at a step: beta1_decay^step."""
    return beta1_decay**step


def turn_to_gradient_(
    update: Tensor, direction: Tensor, share: float | Tensor, scratch: Tensor | None = None
) -> Tensor:
    """Blend the update with its own magnitude in the gradient's direction.

    Args:
        update: the update, (tensors, rows, columns); overwritten by the result.
        direction: sign of the gradient.
        share: how much of the direction is the gradient's, from `gradient_share`.
        scratch: memory to compute in, of update's shape; allocated where None.

    Returns:
        share * |update| * direction + (1 - share) * update.
    """
    return update.lerp_(torch.abs(update, out=scratch).mul_(direction), share)

"""Automagic's learning-rate mask (ostris/ai-toolkit): every element finds its own learning rate in the warm-up."""

from __future__ import annotations

import torch
from torch import Tensor


def positive(direction: Tensor) -> Tensor:
    """The polarity of a gradient, bool. LoRA downs have gradients of exactly 0 at first; they count as negative."""
    return direction > 0


def bump_(
    lr_mask: Tensor, polarity: Tensor, last_polarity: Tensor, lr_bump: float, min_lr: float, max_lr: float
) -> None:
    """Raise the rate of elements whose gradient kept its sign since the step before, lower the others.

    Args:
        lr_mask: learning rates, (tensors, rows, columns); updated, and kept in [min_lr, max_lr].
        polarity: bool, whether the gradient is positive.
        last_polarity: bool, whether it was at the step before.
        lr_bump: how far a rate moves.
        min_lr: lower bound.
        max_lr: upper bound.
    """
    if torch.compiler.is_compiling():  # In numbers: code generated for bools in memory takes many times as long.
        differs = (polarity.to(lr_mask.dtype) - last_polarity.to(lr_mask.dtype)).abs()
    else:
        differs = (polarity ^ last_polarity).to(lr_mask.dtype)
    lr_mask.add_(differs.mul_(-2 * lr_bump).add_(lr_bump)).clamp_(min_lr, max_lr)


def scaled(lr_mask: Tensor, multiplier: Tensor, min_lr: float, max_lr: float, out: Tensor | None = None) -> Tensor:
    """The mask times a factor of the whole optimizer, kept in the mask's bounds.

    Args:
        lr_mask: learning rates, (tensors, rows, columns); left as they are.
        multiplier: the factor, 0-d.
        min_lr: lower bound.
        max_lr: upper bound.
        out: memory for the result, of lr_mask's shape; allocated where None.
    """
    return torch.mul(lr_mask, multiplier, out=out).clamp_(min_lr, max_lr)

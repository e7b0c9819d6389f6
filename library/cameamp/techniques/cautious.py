"""Cautious Optimizers (arXiv 2411.16085): move only where the update and the gradient agree."""

from __future__ import annotations

from torch import Tensor


def mask_disagreement_(update: Tensor, direction: Tensor) -> Tensor:
    """Zero the elements whose update opposes the gradient, and scale the rest up for what was lost.

    Args:
        update: the update, (tensors, rows, columns); overwritten by the result.
        direction: sign of the gradient.

    Returns:
        update * agrees * n / (number that agree + 1), per tensor of n elements, as the paper rescales.
    """
    agrees = (update * direction > 0).to(update.dtype)
    count = agrees.sum(dim=(1, 2), keepdim=True)
    return update.mul_(agrees).mul_(update[0].numel() / (count + 1))

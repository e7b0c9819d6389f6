"""AGR: Adaptive Gradient Regularization (arXiv 2407.16944)."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_sum(abs_sums: Tensor, nonzero_counts: Tensor) -> Tensor:
    """Sum of the gradient magnitudes of a parameter group, as AGR divides by it.

    Args:
        abs_sums: sum of |g| of each tensor of the group, 1-d.
        nonzero_counts: how many elements are not 0, 1-d, of whichever parts of the group.

    Returns:
        0-d tensor. Infinity where fewer than two elements are not 0: a single element would be its own sum and
        regularize itself to nothing, and division by infinity leaves every gradient as it is.
    """
    return torch.where(nonzero_counts.sum() < 2, torch.inf, abs_sums.sum())


def regularize_(g: Tensor, total: Tensor, scratch: Tensor | None = None) -> Tensor:
    """g * (1 - |g| / total): an element's share of the whole gradient is taken off it.

    Args:
        g: gradient, (tensors, rows, columns); overwritten by the result.
        total: 0-d, from `magnitude_sum`.
        scratch: memory to compute in, of g's shape; allocated where None.

    Returns:
        The regularized gradient, of g's sign.
    """
    return g.addcmul_(g, torch.abs(g, out=scratch).div_(total), value=-1)

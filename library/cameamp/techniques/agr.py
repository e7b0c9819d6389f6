"""Adaptive Gradient Regularization, AGR (arXiv 2407.16944): shorten each gradient element by its share of the sum."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_sum(abs_sums: Tensor, nonzero_counts: Tensor) -> Tensor:
    """Sum the gradient magnitudes of a parameter group, as the divisor that `regularize_` needs.

    The result is S = sum |g| over the group, or infinity if the group has fewer than two gradient elements other than
    0. A single element would be its own sum and regularize itself to nothing; dividing by infinity leaves it as it is.

    Args:
        abs_sums: sum of |g| of each tensor of the group, (tensors,).
        nonzero_counts: numbers of gradient elements other than 0, 1-d; they may be counted over any parts of the
            group, because only their sum is used.

    Returns:
        S, 0-d, in the unit of the gradient.

    Example:
        >>> magnitude_sum(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 1.0])).item()
        8.0
        >>> magnitude_sum(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])).item()
        inf
    """
    return torch.where(nonzero_counts.sum() < 2, torch.inf, abs_sums.sum())


def regularize_(g: Tensor, total: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Regularize the gradient.

    In the paper, for the gradient g of element i:

        alpha_i = |g_i| / sum_j |g_j|
        grad_i  = (1 - alpha_i) * g_i

    What differs here: j runs over the whole parameter group instead of one layer, and a group with fewer than two
    elements other than 0 keeps its gradient.

    Args:
        g: gradient, (tensors, rows, columns); overwritten by the result.
        total: sum of |g| over the group, 0-d, from `magnitude_sum`.
        scratch: memory to compute in, of g's shape; allocated if None.

    Returns:
        grad, in the unit of g. No element changes its sign or grows.

    Example:
        >>> g = torch.tensor([[[1.0, -3.0]]])
        >>> regularize_(g, total=torch.tensor(4.0)).tolist()
        [[[0.75, -0.75]]]
    """
    return g.addcmul_(g, torch.abs(g, out=scratch).div_(total), value=-1)

"""AdaBelief (arXiv 2010.07468): long steps where the gradient is as predicted, short ones where it surprises."""

from __future__ import annotations

import torch
from torch import Tensor


def divide_by_belief_(exp_avg: Tensor, exp_avg_res: Tensor, residual: Tensor, beta3: float, eps: float) -> Tensor:
    """Update the mean squared residual and divide the momentum by its root.

    Args:
        exp_avg: momentum, (tensors, rows, columns).
        exp_avg_res: running mean of the squared residual + eps; updated.
        residual: how far the gradient lies from what was predicted; overwritten by the result.
        beta3: decay rate of the residual.
        eps: its floor.

    Returns:
        The update.
    """
    exp_avg_res.mul_(beta3).add_((1 - beta3) * eps).addcmul_(residual, residual, value=1 - beta3)
    return torch.rsqrt(exp_avg_res, out=residual).mul_(exp_avg)

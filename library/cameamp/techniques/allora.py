"""ALLoRA (arXiv 2410.09692): rows of a LoRA factor that are still small learn faster; no dropout, no scaling factor."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scaling(p: Tensor, eta: float) -> Tensor:
    """Factors of the learning rate of each row: 1 / sqrt(norm of the row + 1 / eta^2).

    Args:
        p: the weights, (tensors, rows, columns).
        eta: the factor of a row of norm 0.

    Returns:
        (tensors, rows, 1).
    """
    return torch.linalg.vector_norm(p, dim=2, keepdim=True).add_(1 / (eta * eta)).rsqrt_()

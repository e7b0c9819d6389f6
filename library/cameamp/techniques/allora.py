"""ALLoRA (arXiv 2410.09692): small rows of a LoRA factor learn faster, in place of dropout and a scaling factor."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scaling(p: Tensor, eta: float) -> Tensor:
    """The factor of the learning rate of each row of a LoRA factor.

    In the paper, for row i of the up factor B, whose gradient it multiplies:

        1 / sqrt(|B_i| + 1 / eta^2)

    What differs here: it multiplies the learning rate, after everything that normalizes gradients, and it does so in
    both factors of a LoRA.

    Args:
        p: the weights, (tensors, rows, columns).
        eta: the factor of a row of norm 0.

    Returns:
        The factors, (tensors, rows, 1), plain numbers between 0 and eta.

    Example:
        Rows of norm 0, 0.75 and 15.75:

        >>> row_scaling(torch.tensor([[[0.0], [0.75], [15.75]]]), eta=2.0).tolist()
        [[[2.0], [1.0], [0.25]]]
    """
    norms: Tensor = torch.linalg.vector_norm(p, dim=2, keepdim=True)
    return norms.add_(1 / (eta * eta)).rsqrt_()

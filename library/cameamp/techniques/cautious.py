"""Cautious Optimizers (arXiv 2411.16085): change only the weights whose update and gradient agree."""

from __future__ import annotations

from torch import Tensor

from .sums import OF_WHOLE_TENSORS, Sums


def mask_disagreement_(update: Tensor, direction: Tensor, sums: Sums = OF_WHOLE_TENSORS) -> Tensor:
    """Set the elements whose update opposes the gradient to 0, and scale up the others in return.

    As in the paper, with the update u and the gradient g of a tensor of n elements:

        agrees = 1 if u * g > 0 else 0
        u      = u * agrees * n / (sum(agrees) + 1)

    Nothing differs here: only the sign of g matters, so its sign is what the function takes.

    Args:
        update: the update u, (tensors, rows, columns); overwritten by the result.
        direction: sign of the gradient, of the same shape: -1, 0 or 1.
        sums: adds up over whole tensors.

    Returns:
        The masked update, in the unit of `update`.

    Example:
        >>> import torch
        >>> update, direction = torch.tensor([[[1.0, 2.0, -3.0]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
        >>> mask_disagreement_(update, direction).abs().tolist()
        [[[1.0, 2.0, 0.0]]]
    """
    agrees = (update * direction > 0).to(update.dtype)
    count = sums.counts(agrees)
    return update.mul_(agrees).mul_(sums.numel(update) / (count + 1))

"""Orthogonal gradient (arXiv 2501.04697): no step along the weights, which only scales them."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-30


def remove_part_along_weights_(update: Tensor, p: Tensor, eps: float, scratch: Tensor | None = None) -> Tensor:
    """Take from each tensor's update the part along its weights, and give the rest the whole one's norm.

    Args:
        update: the update, (tensors, rows, columns); overwritten by the result.
        p: the weights, of the same shape.
        eps: floor of the norm of what is left, so that an update along the weights is not blown up from rounding.
        scratch: memory to compute in, of p's shape; allocated where None.

    Returns:
        The orthogonal update; unchanged for weights with a norm of at most 1e-30 and for single elements.
    """
    if p[0].numel() == 1:
        return update
    u, w = update.flatten(1), p.flatten(1)
    u_norm, w_norm = _norms(u), _norms(w)
    has_direction = w_norm > _SMALLEST_NORM
    # Dividing twice by the norm, not once by its square, which underflows for small weights.
    products = torch.mul(update, p, out=scratch).flatten(1)
    along = products.sum(dim=1, keepdim=True).div_(w_norm).div_(w_norm)
    u.addcmul_(w, torch.where(has_direction, along, 0.0), value=-1)
    u.mul_(torch.where(has_direction, u_norm / _norms(u).clamp_min_(eps), 1.0))
    return update


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)

"""Orthogonal gradient, OrthoGrad (arXiv 2501.04697): no step along the weights, which would only scale them."""

from __future__ import annotations

import torch
from torch import Tensor

from .sums import OF_WHOLE_TENSORS, Sums

SMALLEST_NORM = 1e-30


def remove_part_along_weights_(
    update: Tensor, p: Tensor, eps: float, scratch: Tensor | None = None, sums: Sums = OF_WHOLE_TENSORS
) -> Tensor:
    """Remove from each tensor's update the part along its weights, and scale the rest to the norm of the whole.

    In the paper, with the gradient g and the weights p of a layer as vectors:

        g = g - p * (p . g) / (p . p)

    What differs here: the finished update u is projected instead of the gradient, and it gets its norm back, which the
    authors' code does as well.

        v = u - p * (p . u) / (p . p)
        u = v * |u| / max(|v|, eps)

    Args:
        update: the update u, (tensors, rows, columns); overwritten by the result.
        p: the weights, of the same shape.
        eps: floor of |v|, so that an update along the weights does not become amplified rounding errors.
        scratch: memory to compute in, of p's shape; allocated if None.
        sums: adds up over whole tensors.

    Returns:
        The orthogonal update, in the unit of `update`. It is unchanged for tensors of a single element and for weights
        with a norm of at most 1e-30.

    Example:
        The part (3, 0) lies along the weights; what is left, (0, 4), gets the norm 5 of the whole.

        >>> u = remove_part_along_weights_(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0, 0.0]]]), eps=1e-8)
        >>> [round(x, 3) for x in u.flatten().tolist()]
        [0.0, 5.0]
    """
    if sums.numel(p) == 1:
        return update
    u, w = update.flatten(1), p.flatten(1)
    u_norm, w_norm, products = sums.norms_and_products(u, w, scratch)
    has_direction = w_norm > SMALLEST_NORM
    # Dividing twice by the norm, not once by its square, which underflows for small weights.
    along = products.div_(w_norm).div_(w_norm)
    u.addcmul_(w, torch.where(has_direction, along, 0.0), value=-1)
    u.mul_(torch.where(has_direction, u_norm / sums.norms_of_rest(u).clamp_min_(eps), 1.0))
    return update

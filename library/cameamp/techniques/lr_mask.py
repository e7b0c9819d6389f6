"""The learning-rate mask of Automagic (no paper; ostris/ai-toolkit): every element finds its own learning rate.

The mask is adjusted in the warm-up, by one bump a step, and applied in every step.
"""

from __future__ import annotations

from torch import Tensor

# A bump is computed for so many elements at once: of a very large tensor a whole copy would be too much.
_LARGEST_PART = 2**23


def positive(direction: Tensor) -> Tensor:
    """The polarity of a gradient: whether it is above 0.

    A gradient of exactly 0, as the down factors of a fresh LoRA have at first, counts as negative. It so agrees with
    the 0 of the step before.

    Args:
        direction: the gradient or its sign, of any shape.

    Returns:
        Bool, of the same shape.

    Example:
        >>> import torch
        >>> positive(torch.tensor([1.0, 0.0, -1.0])).tolist()
        [True, False, False]
    """
    return direction > 0


def bump_(
    lr_mask: Tensor, polarity: Tensor, last_polarity: Tensor, lr_bump: float, min_lr: float, max_lr: float
) -> None:
    """Raise the learning rate of elements whose gradient has the sign of the step before, and lower the others.

    As in ai-toolkit:

        mask = mask + lr_bump   if the polarity is that of the step before
               mask - lr_bump   if it is not
        mask = max(min_lr, min(mask, max_lr))

    What differs here: it is called in the warm-up alone, and the default bump is 3e-6 instead of 1e-6.

    Args:
        lr_mask: learning rates, change of a weight per unit of the update, (tensors, rows, columns); updated.
        polarity: polarity of this step's gradient, bool, from `positive`.
        last_polarity: polarity of the gradient at the step before, bool.
        lr_bump: size of one adjustment.
        min_lr: lower bound of the mask.
        max_lr: upper bound of the mask.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[5e-4, 5e-4, 1e-3]]])
        >>> now, before = torch.tensor([[[True, False, False]]]), torch.tensor([[[True, True, False]]])
        >>> bump_(mask, now, before, lr_bump=1e-4, min_lr=1e-7, max_lr=1e-3)
        >>> [round(x, 7) for x in mask.flatten().tolist()]
        [0.0006, 0.0004, 0.001]
    """
    rows = max(1, _LARGEST_PART // (len(lr_mask) * max(1, lr_mask.shape[2])))
    for mask, now, before in zip(*(stack.split(rows, dim=1) for stack in (lr_mask, polarity, last_polarity))):
        differs = (now ^ before).to(mask.dtype)
        mask.add_(differs.mul_(-2 * lr_bump).add_(lr_bump)).clamp_(min_lr, max_lr)

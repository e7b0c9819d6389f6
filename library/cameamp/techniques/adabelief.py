"""AdaBelief (arXiv 2010.07468): long steps if the gradient is as predicted, short ones if it is a surprise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The longest step of an element, in units of its learning rate. Where gradients are steady the residual is small at
# first, which has seen little of it, and dies out in thousands of steps: the update would grow to 60 and to 220.
LONGEST = 10.0


def bias_correction(beta3: float, step: int) -> float:
    """The factor that corrects the update for the residual's start at 0: sqrt(1 - beta3^t) at step t, counted from 1.

    A running mean that starts at 0 has gathered weights of only 1 - beta3^t after t steps.

    Example:
        >>> [round(bias_correction(0.999, step), 3) for step in (1, 1000)]
        [0.032, 0.795]
    """
    return math.sqrt(1 - beta3**step)


def divide_by_belief_(
    exp_avg: Tensor,
    exp_avg_res: Tensor,
    residual: Tensor,
    beta3: float,
    eps: float,
    correction: float | None = None,
) -> Tensor:
    """Update the mean squared residual and divide the momentum by its root.

    In the paper, with the gradient g, the momentum m and the belief s:

        s = b * s + (1 - b) * (g - m)^2 + eps
        u = (m / (1 - b1^t)) / (sqrt(s / (1 - b^t)) + eps)

    What differs here: g is the scaled gradient, which CAME has divided once already; eps enters inside the average
    alone; the residual g - m is taken from what the momentum predicts (see `tam.py` and `consistency.py`); no bias is
    corrected unless `correction` is given; and u is bounded.

        exp_avg_res = b3 * exp_avg_res + (1 - b3) * (residual^2 + eps)
        u           = exp_avg / sqrt(exp_avg_res) * correction, from -10 to 10

    Args:
        exp_avg: momentum m, (tensors, rows, columns).
        exp_avg_res: mean squared residual s; updated.
        residual: difference between the scaled gradient and its prediction; overwritten by the result.
        beta3: decay rate b3 of the mean squared residual.
        eps: floor of the mean squared residual.
        correction: from `bias_correction`; None for no correction, which makes the first steps longer.

    Returns:
        The update u, a plain number.

    Example:
        The momentum is the same for both elements; the second one's gradient was the larger surprise.

        >>> momentum, mean = torch.ones(1, 1, 2), torch.full((1, 1, 2), 0.25)
        >>> u = divide_by_belief_(momentum, mean, torch.tensor([[[0.5, 1.5]]]), beta3=0.5, eps=0.0)
        >>> [round(x, 3) for x in mean.flatten().tolist()]
        [0.25, 1.25]
        >>> [round(x, 3) for x in u.flatten().tolist()]
        [2.0, 0.894]

        Nothing is surprising about the third: its step is as long as the bound.

        >>> divide_by_belief_(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 0.5, 1e-16).item()
        10.0
    """
    # Towards the floor, then the square on top: one pass over memory less than scaling and adding a number.
    exp_avg_res.lerp_(exp_avg_res.new_full((), eps), 1 - beta3).addcmul_(residual, residual, value=1 - beta3)
    update = torch.rsqrt(exp_avg_res, out=residual).mul_(exp_avg)
    update = update if correction is None else update.mul_(correction)
    return update.clamp_(-LONGEST, LONGEST)

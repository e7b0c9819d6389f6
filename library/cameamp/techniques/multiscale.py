"""Multi-scale momentum: averages of the scaled gradient that are updated every so many steps, and so look back further.

Every average has the same decay per update; one that is updated every 25th step remembers 25 times as long. This is the
project's own technique, after the nested momenta of deep optimizers. At step t, with the scaled gradient sg:

    m_K <- 0.9 m_K + 0.1 sg                             for every period K that divides t
    mean = sum over K of w_K m_K / (1 - 0.9^n_K),       w_K = (1 / K) / (sum over K of 1 / K)

n_K counts the updates of m_K, and only momenta with n_K > 0 take part. The mean drives the momentum in place of sg.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .sums import OF_WHOLE_TENSORS, Sums

DECAY = 0.9


class Scale(NamedTuple):
    """One of the momenta, at one step.

    Attributes:
        period: how often it is updated, in steps.
        rate: how far it goes towards the gradient; 0 when it is not due.
        share: what it is multiplied by in the weighted mean; 0 while it was never updated.
    """

    period: int
    rate: float
    share: float


class Momenta(Protocol):
    """The multi-scale momenta of a stack."""

    def update_momenta(
        self,
        scales: Sequence[Scale],
        target: Tensor,
        out: Tensor,
        scratch: Tensor | None = None,
        sums: Sums = OF_WHOLE_TENSORS,
    ) -> None:
        """Take each momentum m to (1 - rate) m + rate * target, and put the sum of share * m into `out`."""


def is_due(period: int, step: int) -> bool:
    """Whether the momentum of a period is updated at a step, counted from 1."""
    return step % period == 0


def shares(periods: Sequence[int], counts: Sequence[int]) -> tuple[float, ...]:
    """What each momentum is multiplied by in their weighted mean.

    Args:
        periods: update periods of the momenta.
        counts: how often each has been updated.

    Returns:
        For each momentum 1 / period, divided by the sum of these over the momenta updated so far, and by
        1 - 0.9^count, the weights that a momentum has gathered since it was 0; 0 for one that was never updated.

    After five steps of a constant gradient of 1 both momenta are debiased to it, so their mean is 1:

        >>> periods, counts = (1, 5), (5, 1)
        >>> momenta = [1 - DECAY**count for count in counts]
        >>> round(sum(share * m for share, m in zip(shares(periods, counts), momenta)), 6)
        1.0
    """
    total = sum(1 / period for period, count in zip(periods, counts) if count > 0)
    return tuple(
        1 / period / total / (1 - DECAY**count) if count > 0 else 0.0 for period, count in zip(periods, counts)
    )


@lru_cache(maxsize=32)
def scales(periods: tuple[int, ...], counts: tuple[int, ...], step: int) -> tuple[Scale, ...]:
    """The momenta at a step, counted from 1. All stacks of a step ask for the same.

    Args:
        periods: their update periods.
        counts: how often each has been updated, this step included.
        step: the step.
    """
    return tuple(
        Scale(period, 1 - DECAY if is_due(period, step) else 0.0, share)
        for period, share in zip(periods, shares(periods, counts))
    )


def multi_scale_momentum(
    scaled_grad: Tensor,
    direction: Tensor,
    momenta: Momenta,
    scales: Sequence[Scale],
    out: Tensor | None = None,
    scratch: Tensor | None = None,
    sums: Sums = OF_WHOLE_TENSORS,
) -> Tensor | None:
    """Update the momenta that are due, and take the weighted mean of all.

    Args:
        scaled_grad: scaled gradient, (tensors, rows, columns).
        direction: sign of the gradient.
        momenta: the stack that has them.
        scales: the momenta at this step.
        out: memory for the result, of scaled_grad's shape; allocated if it is None.
        scratch: memory to compute in, likewise.
        sums: adds up over whole tensors.

    Returns:
        What drives the momentum in place of the scaled gradient; None if no momentum was ever updated. An element
        whose gradient is exactly 0 gets 0, as it would of the gradient itself: codes of low rank do not know which
        elements never had a gradient, and those must not drift.
    """
    begun = [scale for scale in scales if scale.share != 0]
    if not begun:
        return None
    mean = torch.empty_like(scaled_grad) if out is None else out
    momenta.update_momenta(begun, scaled_grad, mean, scratch, sums)
    return mean.mul_(torch.abs(direction, out=scratch))

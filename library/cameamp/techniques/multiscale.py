"""Multi-scale momentum: averages of the scaled gradient that are updated every so many steps, and so look back further.

Every average has the same decay a update; one that is updated every 25th step remembers 25 times as long. This is the
project's own technique, after the nested momenta of deep optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DECAY = 0.9


class Scale(NamedTuple):
    """One of the momenta, at one step.

    Attributes:
        name: the state that holds it.
        rate: how far it moves towards the gradient; 0 when it is not due.
        share: what it is multiplied by in the weighted mean; 0 while it was never updated.
    """

    name: str
    rate: float
    share: float


class Momenta(Protocol):
    """The multi-scale momenta of a stack, by name. `out` and `scratch` are memory to use where given."""

    def move(
        self, name: str, target: Tensor, rate: float, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> tuple[Tensor, float] | None:
        """Keep (1 - rate) * momentum + rate * target.

        Returns:
            A stack, and the factor that makes it a copy of that momentum; None where it stays packed.
        """

    def add_to(
        self, stack: Tensor, stack_share: float, shares: Sequence[tuple[str, float]], out: Tensor | None = None
    ) -> None:
        """stack_share * stack + the sum of share * momentum, in `stack`."""


def momentum_name(period: int) -> str:
    """The state that holds the momentum of a period."""
    return f"momentum_scale_{period}"


def momentum_count(period: int) -> str:
    """The state that counts the updates of the momentum of a period."""
    return f"momentum_count_{period}"


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
        Scale(momentum_name(period), 1 - DECAY if is_due(period, step) else 0.0, share)
        for period, share in zip(periods, shares(periods, counts))
    )


def multi_scale_momentum(
    scaled_grad: Tensor,
    direction: Tensor,
    momenta: Momenta,
    scales: Sequence[Scale],
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor | None:
    """Update the momenta that are due, and take the weighted mean of all.

    Args:
        scaled_grad: scaled gradient, (tensors, rows, columns).
        direction: sign of the gradient.
        momenta: how the momenta are kept.
        scales: the momenta at this step.
        out: memory for the result, of scaled_grad's shape; allocated where None.
        scratch: memory to compute in, likewise.

    Returns:
        What drives the momentum in place of the scaled gradient; None where no momentum was ever updated. An element
        whose gradient is exactly 0 gets 0, as it would of the gradient itself: codes of low rank do not know which
        elements never had a gradient, and those must not drift.
    """
    if not any(scale.share for scale in scales):
        return None
    mean = torch.empty_like(scaled_grad) if out is None else out
    mean_share = 0.0  # What the mean still has to be multiplied by: that is done where the packed momenta are added.
    packed: list[tuple[str, float]] = []
    for name, rate, share in scales:
        if share == 0:  # Never updated, not in this step either.
            continue
        room = mean if mean_share == 0 else None
        moved = momenta.move(name, scaled_grad, rate, room, scratch) if rate != 0 else None
        if moved is None:
            packed.append((name, share))
            continue
        stack, factor = moved
        if mean_share == 0:
            mean_share = share * factor
        else:
            mean.add_(stack, alpha=share * factor / mean_share)
        del stack, moved
    if mean_share == 0:
        mean.zero_()
    momenta.add_to(mean, mean_share or 1.0, packed, scratch)
    # Keeps the mean where the sign is not 0, in one pass: products take two, a mask of bools four times as long.
    return torch.ops.aten.hardshrink_backward.grad_input(mean, direction, 0.5, grad_input=mean)

"""Multi-scale momentum: averages of the scaled gradient that are updated every so many steps, and so look back further.

Every average has the same decay a update; one that is updated every 25th step remembers 25 times as long. This is the
project's own technique, after the nested momenta of deep optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence

DECAY = 0.9


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

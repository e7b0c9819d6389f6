"""Learning-rate schedules, as factors of a rate by step and number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]

# The share of a run in which the rate rises, with cosine.
_RISE = 0.05


def constant(step: int, steps: int) -> float:
    """The same rate at every step."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """A linear rise over the first twentieth of the run, then half a cosine to 0.

    Example:
        >>> [round(cosine(step, 100), 3) for step in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    rise = max(1, round(_RISE * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine}

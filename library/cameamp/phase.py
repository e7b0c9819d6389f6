"""The phases of a run: which rules act, and which states exist, changes twice."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """Which rules act on a parameter; the same for a whole stack, and for hundreds of steps.

    Attributes:
        early: first half of the warm-up: torque-aware momentum, orthogonal gradient, weight decay.
        warmup: the whole warm-up, its first half included: the learning-rate mask is adjusted.
    """

    early: bool
    warmup: bool

    @classmethod
    def at(cls, step: int, warmup_steps: int) -> Phase:
        """The phase of a step, counted from 1."""
        return cls(early=step < warmup_steps / 2, warmup=step < warmup_steps)

    @property
    def title(self) -> str:
        """What log lines call it."""
        return "early" if self.early else "warm-up" if self.warmup else "after the warm-up"

"""Which runs the study consists of, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator

from ..contenders import OURS, REFERENCE
from .optimizers import (
    CONTEXTUAL,
    CONTEXTUAL_8BIT,
    DEFAULT_RATE,
    OUR_RATES,
    PEER_RATES,
    PLAIN,
    PLAIN_8BIT,
    beyond,
    rates,
)
from .runs import DIGITS, DIGITS_128, Run, Runs
from .variants import ALONE, CONTEXT_FORMULAS, CONTEXT_LEFT_OUT, FORMULAS, LEFT_OUT, WARMUPS

OPTIMIZERS = (REFERENCE, *OURS, *(name for name in PEER_RATES if name != REFERENCE))

# Where techniques are left out: the plain optimizer at its best power of ten, the contextual one at its default.
PLAIN_RATE = 1e-4
# Where formulas are changed: also the plain one at its default, and at a rate that is too high for it.
CASES = ((PLAIN, DEFAULT_RATE), (PLAIN, PLAIN_RATE), (PLAIN, OUR_RATES[-1]), (CONTEXTUAL, DEFAULT_RATE))
# 8-bit states are compared at these.
PAIRS = ((PLAIN, PLAIN_8BIT, PLAIN_RATE), (CONTEXTUAL, CONTEXTUAL_8BIT, DEFAULT_RATE))


def make_grids(runs: Runs, task: str) -> None:
    """Every optimizer over its learning rates, on one seed; one rate more where the best is at the edge."""
    for optimizer in OPTIMIZERS:
        for lr in rates(optimizer):
            runs.make(Run(task, optimizer, lr))
        best = runs.best_rate(task, optimizer)
        more = None if best is None else beyond(optimizer, best)
        if more is not None and more not in runs.grid(task, optimizer):
            runs.make(Run(task, optimizer, more))


def make_seeds(runs: Runs, task: str, seeds: int) -> None:
    """Every optimizer at its best rate, and ours at the default too, on more seeds."""
    for seed in range(1, seeds):
        for optimizer in OPTIMIZERS:
            for lr in rates_on_seeds(runs, task, optimizer):
                runs.make(Run(task, optimizer, lr, seed))


def rates_on_seeds(runs: Runs, task: str, optimizer: str) -> list[float]:
    """The rates at which an optimizer is run on more than one seed."""
    best = runs.best_rate(task, optimizer)
    if best is None:
        return []
    return [best, DEFAULT_RATE] if optimizer in OURS and best != DEFAULT_RATE else [best]


def ablations() -> Iterator[Run]:
    """Techniques left out and alone, on one seed."""
    for name in LEFT_OUT:
        yield Run(DIGITS, PLAIN, PLAIN_RATE, 0, name)
    for name in (*CONTEXT_LEFT_OUT, *LEFT_OUT, *ALONE):
        yield Run(DIGITS, CONTEXTUAL, DEFAULT_RATE, 0, name)


def formulas(task: str, seed: int) -> Iterator[Run]:
    """Other formulas; the length of the warm-up on the first seed alone."""
    for optimizer, lr in CASES:
        yield Run(task, optimizer, lr, seed)
        for name in CONTEXT_FORMULAS if optimizer == CONTEXTUAL else FORMULAS:
            if seed == 0 or name not in WARMUPS:
                yield Run(task, optimizer, lr, seed, name)


def precisions() -> Iterator[Run]:
    """8-bit states beside 32-bit ones where all factors are coded."""
    for full, coded, lr in PAIRS:
        for optimizer in (full, coded):
            yield Run(DIGITS_128, optimizer, lr)

"""The runs that the study consists of, the most informative first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..contenders import FAMILY, REFERENCE
from .optimizers import (
    CONTEXTUAL,
    CONTEXTUAL_8BIT,
    DEFAULT_RATE,
    FAMILY_RATES,
    PEER_RATES,
    PLAIN,
    beyond,
    rates,
)
from .runs import Run, Runs
from .variants import ADVISED, ALONE, AS_IT_IS, CONTEXT_FORMULAS, CONTEXT_LEFT_OUT, FORMULAS, LEFT_OUT, OPTIONS, WARMUPS

OPTIMIZERS = (REFERENCE, *FAMILY, *(name for name in PEER_RATES if name != REFERENCE))

# The cases in which techniques are left out and formulas changed: the plain optimizer at its best rate for the LoRA, at
# its default rate and at a rate that is too high for the LoRA; the contextual optimizer at its default rate.
PLAIN_RATE = 3e-4
CASES = ((PLAIN, PLAIN_RATE), (CONTEXTUAL, DEFAULT_RATE), (PLAIN, DEFAULT_RATE), (PLAIN, FAMILY_RATES[-1]))


# The cases with other options: all of them in 32 bits, and in 8 bits the options that are advised for short runs.
OPTION_CASES = (*((CONTEXTUAL, name) for name in (AS_IT_IS, *OPTIONS)), (CONTEXTUAL_8BIT, ADVISED))


def make_grids(runs: Runs, task: str, optimizers: Sequence[str]) -> None:
    """Train optimizers over their learning rates, on one seed, with more rates as long as the best is at the edge."""
    for optimizer in optimizers:
        for lr in rates(optimizer):
            runs.make(Run(task, optimizer, lr))
        while True:
            grid = runs.grid(task, optimizer)
            more = beyond(optimizer, grid, min(grid, key=lambda lr: grid[lr].final))
            if more is None:
                break
            runs.make(Run(task, optimizer, more))


def make_seeds(runs: Runs, task: str, optimizers: Sequence[str], seeds: int) -> None:
    """Train optimizers at their best rate, the family also at the default rate, on more seeds."""
    for seed in range(1, seeds):
        for optimizer in optimizers:
            for lr in rates_on_seeds(runs, task, optimizer):
                runs.make(Run(task, optimizer, lr, seed))


def rates_on_seeds(runs: Runs, task: str, optimizer: str) -> list[float]:
    """The rates at which an optimizer is run on more than one seed."""
    best = runs.best_rate(task, optimizer)
    if best is None:
        return []
    return [best, DEFAULT_RATE] if optimizer in FAMILY and best != DEFAULT_RATE else [best]


def ablations(task: str) -> Iterator[Run]:
    """Techniques left out and alone, on one seed."""
    for optimizer, lr in CASES[:2]:
        yield Run(task, optimizer, lr)
        for name in (*LEFT_OUT, *CONTEXT_LEFT_OUT, *ALONE) if optimizer == CONTEXTUAL else LEFT_OUT:
            yield Run(task, optimizer, lr, 0, name)


def formulas(task: str, seed: int) -> Iterator[Run]:
    """Other formulas, on one seed."""
    for optimizer, lr in CASES:
        yield Run(task, optimizer, lr, seed)
        for name in CONTEXT_FORMULAS if optimizer == CONTEXTUAL else FORMULAS:
            yield Run(task, optimizer, lr, seed, name)


def options(task: str, seed: int) -> Iterator[Run]:
    """The contextual optimizers with options that promise a lower loss: on the first seed over the learning rates."""
    for lr in FAMILY_RATES if seed == 0 else (DEFAULT_RATE,):
        for optimizer, name in OPTION_CASES:
            yield Run(task, optimizer, lr, seed, name)


def warmups(task: str, seed: int) -> Iterator[Run]:
    """Other lengths of the warm-up, on one seed."""
    for optimizer, lr in CASES[:2]:
        yield Run(task, optimizer, lr, seed)
        for name in WARMUPS:
            yield Run(task, optimizer, lr, seed, name)

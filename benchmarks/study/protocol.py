"""Fine-tunes under schedules: what is trained by which optimizer, and how far it ends from AdamW at its best rate."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from ..contenders import FAMILY, REFERENCE
from .digits import AllOfDigits, DigitsLoRA
from .encoder import Encoder
from .finished import Finished
from .optimizers import CONTEXTUAL, CONTEXTUAL_8BIT, PLAIN, builder
from .schedules import SCHEDULES
from .task import Named, Spoil, Task, as_they_are, train
from .text import Text
from .variants import VARIANTS, Variant

TASKS: dict[str, Callable[[int], Task]] = {
    "digits, LoRA": partial(DigitsLoRA, rank=16, batch_size=8, images=80),
    "digits, all weights": partial(AllOfDigits, batch_size=8, images=80),
    "encoder, LoRA": partial(Encoder, lora=True),
    "encoder, all weights": partial(Encoder, lora=False),
    "text from random weights": Text,
}

_EVALUATIONS = 20
_SAMPLES = 10_000

# Where a grid begins, for LoRAs; and what AdamW's rates are divided by where all weights are trained.
_ADAM = (1e-3, 2e-3, 4e-3)
_SMALLER = {"digits, all weights": 8, "encoder, all weights": 32}
_GRIDS: dict[str, tuple[float, ...]] = {
    REFERENCE: _ADAM,
    "bitsandbytes AdamW8bit": _ADAM,
    "pytorch_optimizer CAME": (1.25e-4, 2.5e-4, 5e-4),
    "prodigyopt Prodigy": (0.5, 1.0, 2.0),
    "prodigy-plus-schedule-free": (0.5, 1.0, 2.0),
    "schedule-free AdamW": (2e-3, 4e-3, 8e-3),
    "adv_optm Prodigy_adv": (0.5, 1.0, 2.0),
    "adv_optm SinkSGD_adv": (5e-4, 1e-3, 2e-3),
}
# The schedule that an optimizer asks for, whatever the case's is.
_ASKS_FOR = {"prodigy-plus-schedule-free": "constant", "schedule-free AdamW": "constant"}


class Case(NamedTuple):
    """What is compared.

    Attributes:
        task: the name of a task.
        steps: of a run.
        schedule: the name of a schedule.
    """

    task: str
    steps: int
    schedule: str


@dataclass(frozen=True)
class Contender:
    """An optimizer as it is used.

    Attributes:
        optimizer: its name.
        options: other options than the defaults.
        grid: the learning rates that it is tried at; None for no rate at all.
        spoiled: what goes wrong with the data.
        variant: how one of the four optimizers is changed.
    """

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[float, ...] | None = None
    spoiled: str = ""
    variant: Variant = Variant()  # noqa: RUF009 - it is frozen


def _ours(spoiled: str = "", optimizer: str = CONTEXTUAL, **options: Any) -> Contender:
    return Contender(optimizer, options, None, spoiled)


CONTENDERS: dict[str, Contender] = {
    "contextual": _ours(),
    "contextual, 8 bits": _ours(optimizer=CONTEXTUAL_8BIT),
    "contextual from 1e-5": _ours(lr=1e-5),
    "contextual from 1e-4": _ours(lr=1e-4),
    "contextual from 1e-3": _ours(lr=1e-3),
    "contextual, max_lr 1e-2": _ours(max_lr=1e-2),
    "contextual, max_lr 1e-1": _ours(max_lr=1e-1),
    "contextual, warmup_steps 100": _ours(warmup_steps=100),
    "contextual, warmup_steps 500": _ours(warmup_steps=500),
    "contextual, 2 % of batches are noise": _ours("noise"),
    "contextual, loss tenfold for 20 steps": _ours("tenfold"),
    "base": Contender(PLAIN, {}, (3e-4, 1e-3)),
    "base at 1e-3, warmup_steps 200": Contender(PLAIN, {"lr": 1e-3, "warmup_steps": 200}),
    **{name: Contender(name, {}, grid) for name, grid in _GRIDS.items() if name != REFERENCE},
    **{f"contextual, {name}": Contender(CONTEXTUAL, variant=variant) for name, variant in VARIANTS.items()},
}
_ADAMW = Contender(REFERENCE, {}, _GRIDS[REFERENCE])
_OURS = "contextual"


class Interval(NamedTuple):
    """A mean and its bootstrap interval of 95 %."""

    low: float
    mean: float
    high: float


class Study:
    """Runs that are trained once and then looked up.

    Args:
        finished: the results.
    """

    def __init__(self, finished: Finished) -> None:
        self._finished = finished

    def train(self, case: Case, contenders: Sequence[str], seed: int) -> None:
        """Train AdamW and contenders on a seed: on the first over their rates, on the others at the best."""
        for name, contender in ((REFERENCE, _ADAMW), *((name, CONTENDERS[name]) for name in contenders)):
            for lr in _rates(contender, case) if seed == 0 else (self._best(name, contender, case),):
                self._make(name, contender, case, lr, seed)
            while seed == 0 and contender.grid is not None:
                tried = self._grid(name, contender, case)
                best = min(tried, key=lambda lr: tried[lr][-1])
                if best not in (min(tried), max(tried)):
                    break
                self._make(name, contender, case, best / 2 if best == min(tried) else best * 2, seed)

    def table(self, case: Case) -> Iterator[str]:
        """How the contenders end beside AdamW at its best rate; nothing where there is nothing to compare."""
        tried = self._grid(REFERENCE, _ADAMW, case)
        if not tried or not any(self._grid(name, contender, case) for name, contender in CONTENDERS.items()):
            return
        best = min(tried, key=lambda lr: tried[lr][-1])
        rates = "  ".join(f"{lr:g}: {losses[-1]:.5g}" for lr, losses in sorted(tried.items()))
        yield f"{case.task}, {case.steps} steps, {case.schedule}; AdamW on the first seed  {rates}"
        yield f"    {'':56}{'rate':>8} seeds  to AdamW, and an interval of 95 %    AdamW's loss after  to contextual"
        for name, contender in CONTENDERS.items():
            own = self._grid(name, contender, case)
            if not own:
                continue
            lr = min(own, key=lambda lr: own[lr][-1])
            key = partial(_key, name, contender, case, None if math.isnan(lr) else lr)
            pairs = list(self._pairs(key, partial(_key, REFERENCE, _ADAMW, case, best)))
            ratios = interval([ours[-1] / theirs[-1] - 1 for ours, theirs in pairs])
            to_ours = self._pairs(key, partial(_key, _OURS, CONTENDERS[_OURS], case, None))
            differences = [changed[-1] / unchanged[-1] - 1 for changed, unchanged in to_ours]
            shares = [_share(ours, theirs[-1]) for ours, theirs in pairs]
            rate = f"{lr:g}" if contender.grid is not None else ""
            reached = f"{statistics.median(shares):.2f}" if math.isfinite(statistics.median(shares)) else "never"
            spread = f"from {ratios.low:+7.2%} to {ratios.high:+7.2%}" if len(pairs) > 1 else ""
            found = f"{ratios.mean:+8.2%}  {spread:24}"
            difference = f"{statistics.fmean(differences):+8.2%}" if differences and name != _OURS else ""
            yield f"    {name:56}{rate:>8} {len(pairs):5}  {found}   {reached:>10}{difference:>21}".rstrip()
        yield ""

    def _make(self, name: str, contender: Contender, case: Case, lr: float | None, seed: int) -> None:
        key = _key(name, contender, case, lr, seed)
        if key not in self._finished.results:
            losses = self._finished.get(key, lambda: _trained(contender, case, lr, seed))["losses"]
            print(f"{key}: {losses[-1]:.5g}", flush=True)

    def _grid(self, name: str, contender: Contender, case: Case) -> dict[float, list[float]]:
        """The losses of the first seed by rate."""
        start, end = (part.strip() for part in _key(name, contender, case, None, 0).split("lr None"))
        found = {}
        for key, result in self._finished.results.items():
            if key.startswith(start + " lr ") and key.endswith(end):
                lr = key[len(start) + 4 : -len(end)].strip(" ,")
                found[float("nan") if lr == "None" else float(lr)] = result["losses"]
        return found

    def _best(self, name: str, contender: Contender, case: Case) -> float | None:
        tried = self._grid(name, contender, case)
        return None if contender.grid is None else min(tried, key=lambda lr: tried[lr][-1])

    def _pairs(
        self, key: Callable[[int], str], other_key: Callable[[int], str]
    ) -> Iterator[tuple[list[float], list[float]]]:
        """Losses of both on each seed that both were trained on."""
        results, seed = self._finished.results, 0
        while key(seed) in results and other_key(seed) in results:
            yield results[key(seed)]["losses"], results[other_key(seed)]["losses"]
            seed += 1


def interval(values: Sequence[float]) -> Interval:
    """The mean, and where 95 % of the means of samples lie that are drawn from these values, again and again.

    Example:
        >>> low, mean, high = interval([0.0, 1.0, 2.0])
        >>> low < mean < high
        True
    """
    generator = random.Random(0)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(_SAMPLES))
    return Interval(means[_SAMPLES // 40], statistics.fmean(values), means[-_SAMPLES // 40])


def _share(losses: Sequence[float], goal: float) -> float:
    """The share of a run after which a loss is reached; infinity if it never is."""
    return next((number / len(losses) for number, loss in enumerate(losses, 1) if loss <= goal), math.inf)


def _rates(contender: Contender, case: Case) -> Sequence[float | None]:
    if contender.grid is None:
        return (None,)
    smaller = _SMALLER.get(case.task, 1) if contender.grid is _ADAM else 1
    return [lr / smaller for lr in contender.grid]


def _key(name: str, contender: Contender, case: Case, lr: float | None, seed: int) -> str:
    schedule = _ASKS_FOR.get(contender.optimizer, case.schedule)
    return f"{case.task}, {case.steps} steps, {schedule}, {name}, lr {lr if lr is None else f'{lr:g}'}, seed {seed}"


def _trained(contender: Contender, case: Case, lr: float | None, seed: int) -> dict[str, Any]:
    options = dict(contender.options)
    if contender.optimizer in FAMILY:
        # As the README advises.
        options.setdefault("warmup_steps", min(500, case.steps // (8 if contender.optimizer == PLAIN else 2)))
    rate = options.pop("lr", 1e-6) if lr is None else lr
    if contender.optimizer in FAMILY and rate > 1e-3:
        options["max_lr"] = rate
    schedule = SCHEDULES[_ASKS_FOR.get(contender.optimizer, case.schedule)]
    every = max(1, case.steps // _EVALUATIONS)
    build = builder(contender.optimizer, rate, options, contender.variant)
    losses = train(TASKS[case.task](seed), build, case.steps, every, schedule, _SPOILED[contender.spoiled](case.steps))
    return {"losses": [float(f"{loss:.5g}") if math.isfinite(loss) else math.inf for loss in losses]}


def _clean(steps: int) -> Spoil:
    return as_they_are


def _noise(steps: int) -> Spoil:
    """Every fiftieth gradient is noise of the same size."""

    def spoil(number: int, named: Named) -> float:
        if number % 50 == 25:
            generator = torch.Generator().manual_seed(number)
            for _, p in named:
                if p.grad is not None:
                    noise = torch.randn(p.shape, generator=generator)
                    p.grad.copy_(noise * (p.grad.norm() / noise.norm()))
        return 1.0

    return spoil


def _tenfold(steps: int) -> Spoil:
    """From a third of the run on, 20 steps with ten times the loss."""

    def spoil(number: int, named: Named) -> float:
        if not steps // 3 <= number < steps // 3 + 20:
            return 1.0
        for _, p in named:
            if p.grad is not None:
                p.grad.mul_(10)
        return 10.0

    return spoil


_SPOILED = {"": _clean, "noise": _noise, "tenfold": _tenfold}

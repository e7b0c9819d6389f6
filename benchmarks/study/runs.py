"""The runs of the convergence study: their names, their training and their results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..contenders import FAMILY, REFERENCE
from .digits import DigitsLoRA
from .finished import Finished
from .optimizers import beyond, builder, rates
from .task import Task, step_seconds, train
from .text import Text
from .variants import AS_IT_IS, VARIANTS

DIGITS, TEXT = "digits", "text"

# Steps of a run by default, and the number of held-out losses of a run.
STEPS = {DIGITS: 100, TEXT: 200}
_EVALUATIONS = 10
_TIMED_ROUNDS = 25
_HELD_OUT_IMAGES = 80  # half of them: a loss costs as much as three steps


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        task: which task.
        optimizer: which optimizer.
        lr: its learning rate.
        seed: of initial weights and batches.
        variant: the name of what is changed in the optimizer, if it is one of the family.
    """

    task: str
    optimizer: str
    lr: float
    seed: int = 0
    variant: str = AS_IT_IS


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        steps: the steps after which the held-out loss was measured; the last one is the last step of the run.
        losses: these losses, with infinity in place of NaN.
    """

    steps: list[int]
    losses: list[float]

    @property
    def final(self) -> float:
        """The loss after the last step."""
        return self.losses[-1]

    def steps_to(self, loss: float) -> float:
        """Steps to a loss, interpolated linearly between two held-out losses; infinity if it is not reached."""
        for index, (step, reached) in enumerate(zip(self.steps, self.losses)):
            if reached <= loss:
                if index == 0:
                    return step
                before, higher = self.steps[index - 1], self.losses[index - 1]
                return step - (step - before) * (loss - reached) / (higher - reached)
        return math.inf


class Runs:
    """Runs that are trained once and then looked up.

    Args:
        finished: the results.
        steps: number of steps of a run, by task.
    """

    def __init__(self, finished: Finished, steps: Mapping[str, int]) -> None:
        self._finished, self._steps = finished, steps

    def make(self, run: Run) -> Result:
        """The result of a run, which is trained if it is not finished."""
        known = run in self
        result = _result(self._finished.get(self.name(run), lambda: _make(run, self._steps[run.task])))
        if not known:
            print(f"{self.name(run)}: {result.final:.5g}", flush=True)
        return result

    def name(self, run: Run) -> str:
        """The name of a run in the file of results."""
        variant = f", {run.variant}" if run.variant else ""
        return f"{run.task}, {self._steps[run.task]} steps, {run.optimizer}, lr {run.lr:g}, seed {run.seed}{variant}"

    def __getitem__(self, run: Run) -> Result:
        return _result(self._finished.results[self.name(run)])

    def __contains__(self, run: Run) -> bool:
        return self.name(run) in self._finished.results

    def steps(self, task: str) -> int:
        """Number of steps of a run of this task."""
        return self._steps[task]

    def grid(self, task: str, optimizer: str) -> dict[float, Result]:
        """The finished runs over the optimizer's learning rates, by rate, on the first seed."""
        known = {lr: self[run] for lr in rates(optimizer) if (run := Run(task, optimizer, lr)) in self}
        while known and (more := beyond(optimizer, known, _best(known))) is not None:
            if (run := Run(task, optimizer, more)) not in self:
                break
            known[more] = self[run]
        return dict(sorted(known.items()))

    def best_rate(self, task: str, optimizer: str) -> float | None:
        """The learning rate of the lowest final loss; None if no run is finished."""
        known = self.grid(task, optimizer)
        return _best(known) if known else None

    def seeds(self, task: str, optimizer: str, lr: float, variant: str = AS_IT_IS) -> dict[int, Result]:
        """The finished runs at a learning rate, by seed."""
        found: dict[int, Result] = {}
        while (run := Run(task, optimizer, lr, len(found), variant)) in self:
            found[len(found)] = self[run]
        return found

    def time_steps(self, task: str, optimizers: Sequence[str]) -> None:
        """Measure the time of a step of each optimizer at its best rate. All take their steps in turns."""
        rates_of = {optimizer: self.best_rate(task, optimizer) for optimizer in optimizers}
        known = {optimizer: lr for optimizer, lr in rates_of.items() if lr is not None}
        if all(_time_name(task, optimizer) in self._finished.results for optimizer in known):
            return
        builds = {}
        for optimizer, lr in known.items():
            options = {"warmup_steps": _TIMED_ROUNDS // 2} if optimizer in FAMILY else {}
            builds[optimizer] = new_task(task, 0), builder(optimizer, lr, options)
        for optimizer, seconds in step_seconds(builds, _TIMED_ROUNDS).items():
            self._finished.get(_time_name(task, optimizer), partial(dict, milliseconds=round(seconds * 1000, 1)))

    def step_milliseconds(self, task: str, optimizer: str) -> float:
        """CPU time of a step of model and optimizer; NaN if it was not measured."""
        return float(self._finished.results.get(_time_name(task, optimizer), {}).get("milliseconds", math.nan))

    def reference(self, task: str, seed: int) -> Result | None:
        """The result of tuned AdamW on a seed; None if it is not finished."""
        lr = self.best_rate(task, REFERENCE)
        run = Run(task, REFERENCE, lr or 0.0, seed)
        return None if lr is None or run not in self else self[run]


def _time_name(task: str, optimizer: str) -> str:
    return f"{task}, CPU time of a step, {optimizer}"


def new_task(name: str, seed: int) -> Task:
    """The task of this name, at its start."""
    if name == TEXT:
        return Text(seed)
    return DigitsLoRA(seed, rank=16, batch_size=8, images=_HELD_OUT_IMAGES)


def _make(run: Run, steps: int) -> dict[str, Any]:
    variant = VARIANTS[run.variant]
    options = dict(variant.options) if run.optimizer in FAMILY else {}
    if run.optimizer in FAMILY and variant.warmup is not None:
        options["warmup_steps"] = round(variant.warmup * steps)
    every = max(1, steps // _EVALUATIONS)
    losses = train(new_task(run.task, run.seed), builder(run.optimizer, run.lr, options, variant), steps, every)
    rounded = [float(f"{loss:.5g}") if math.isfinite(loss) else math.inf for loss in losses]
    return {"every": every, "steps": steps, "losses": rounded}


def _result(found: Mapping[str, Any]) -> Result:
    steps = list(range(found["every"], found["steps"] + 1, found["every"]))
    if steps[-1] != found["steps"]:
        steps.append(found["steps"])
    return Result(steps, found["losses"])


def _best(grid: Mapping[float, Result]) -> float:
    return min(grid, key=lambda lr: grid[lr].final)

"""The study as pictures."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

from ..contenders import FAMILY, REFERENCE
from .optimizers import DEFAULT_RATE
from .plan import OPTIMIZERS, rates_on_seeds
from .runs import Runs
from .tables import TASKS, shares_of_steps

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker


def save_all(runs: Runs, folder: Path) -> None:
    """Every picture, as PNG."""
    tasks = [task for task in TASKS if runs.best_rate(task, REFERENCE) is not None]
    if not tasks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw, columns in (("curves", _curves, 2), ("range", _range, 1), ("steps", _steps, 1)):
        height = 4.2 if columns == 2 else 3.4
        figure, axes = plt.subplots(len(tasks), columns, figsize=(11, height * len(tasks)), squeeze=False)
        for task, row in zip(tasks, axes):
            draw(runs, task, *row)
        figure.tight_layout()
        figure.savefig(folder / f"study-{name}.png", dpi=90)
        plt.close(figure)


def _curves(runs: Runs, task: str, by_step: Any, by_time: Any) -> None:
    """Held-out loss against steps and against CPU time, the mean of the seeds."""
    for number, optimizer in enumerate(OPTIMIZERS):
        for lr in rates_on_seeds(runs, task, optimizer):
            found = list(runs.seeds(task, optimizer, lr).values())
            if not found:
                continue
            means = [statistics.mean(losses) for losses in zip(*(result.losses for result in found))]
            style: dict[str, Any] = {"color": f"C{number}", "label": f"{optimizer}, {lr:g}"}
            style["linestyle"] = "--" if optimizer in FAMILY and lr == DEFAULT_RATE else "-"
            # An 8-bit curve lies on its 32-bit curve; a thin line on a thick one shows both.
            style["linewidth"] = 1 if optimizer not in FAMILY or optimizer.endswith("8bit") else 3
            steps = found[0].steps
            by_step.plot(steps, means, **style)
            seconds = runs.step_milliseconds(task, optimizer) / 1000
            by_time.plot([step * seconds for step in steps], means, **style)
    for axis, label in ((by_step, "step"), (by_time, "seconds of CPU time, one thread")):
        axis.set_yscale("log")
        axis.set_ylim(top=_top(runs, task))
        _plain_numbers(axis.yaxis)
        axis.set_xlabel(label)
        axis.set_ylabel("held-out loss")
        axis.set_title(task)
    by_time.legend(fontsize=6)


def _top(runs: Runs, task: str) -> float:
    """The upper end of the loss axis, so that one slow start does not flatten the other curves."""
    lr = runs.best_rate(task, REFERENCE)
    losses = runs.grid(task, REFERENCE)[lr].losses if lr is not None else [1.0]
    return 1.6 * losses[0]


def _plain_numbers(axis: Any) -> None:
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(ticker.FormatStrFormatter("%g"))


def _range(runs: Runs, task: str, axis: Any) -> None:
    """Best and worst final loss over the learning rates of each optimizer."""
    known = [optimizer for optimizer in OPTIMIZERS if runs.grid(task, optimizer)]
    for place, optimizer in enumerate(known):
        finals = [result.final for result in runs.grid(task, optimizer).values()]
        finite = [loss for loss in finals if math.isfinite(loss)]
        color = "C1" if optimizer in FAMILY else "C0"
        axis.plot([min(finite), max(finite)], [place, place], color=color, linewidth=4, solid_capstyle="butt")
        axis.plot(finite, [place] * len(finite), "|", color="black")
    axis.set_xscale("log")
    _plain_numbers(axis.xaxis)
    reference = runs.reference(task, 0)
    if reference is not None:
        axis.axvline(reference.final, color="0.6", linewidth=0.8)
        # Runs that diverged would leave no room for the others.
        axis.set_xlim(right=min(axis.get_xlim()[1], 2.2 * reference.final))
    axis.set_yticks(range(len(known)), known)
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss at the end, a mark for each learning rate; the line is tuned AdamW")
    axis.set_title(task)


def _steps(runs: Runs, task: str, axis: Any) -> None:
    """The share of the run after which tuned AdamW's final loss is reached."""
    bars: list[tuple[str, float]] = []
    for optimizer in FAMILY:
        for lr in rates_on_seeds(runs, task, optimizer):
            shares = shares_of_steps(runs, task, runs.seeds(task, optimizer, lr))
            if shares:
                never = sum(map(math.isinf, shares))
                note = f"; not reached in {never} of {len(shares)}" if never else ""
                bars.append((f"{optimizer}, {lr:g}{note}", statistics.median(min(share, 1.0) for share in shares)))
    colors = ["C1" if share < 1 else "0.8" for _, share in bars]
    axis.barh(range(len(bars)), [share for _, share in bars], color=colors)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars])
    axis.invert_yaxis()
    for goal in (0.7, 0.9):
        axis.axvline(goal, color="0.6", linewidth=0.8)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the run after which tuned AdamW's final loss is reached; the lines are the goals")
    axis.set_title(task)

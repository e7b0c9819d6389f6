"""The study as tables of text. Runs that are not finished are left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping

from ..contenders import FAMILY
from .optimizers import CONTEXTUAL, CONTEXTUAL_8BIT, DEFAULT_RATE, FAMILY_RATES, PLAIN, PLAIN_8BIT
from .plan import CASES, OPTIMIZERS, OPTION_CASES, rates_on_seeds
from .runs import DIGITS, TEXT, Result, Run, Runs
from .variants import ALONE, AS_IT_IS, CONTEXT_FORMULAS, CONTEXT_LEFT_OUT, LEFT_OUT, OPTIONS, WARMUPS

TASKS = (DIGITS, TEXT)
_CELL = 20
_NAME_WIDTH = max(len(name) for name in OPTIMIZERS)


def all_tables(runs: Runs) -> Iterator[str]:
    """Every line of every table."""
    for task in TASKS:
        yield from _grids(runs, task)
        yield from _seeds(runs, task)
    for task in TASKS:
        yield from _goals(runs, task)
    for task in TASKS:
        yield from _variants(runs, task)
        yield from _options(runs, task)


def _grids(runs: Runs, task: str) -> Iterator[str]:
    yield f"{task}, {runs.steps(task)} steps, seed 0: held-out loss at the end, by learning rate"
    yield f"    {'':{_NAME_WIDTH}}     best   worst          all"
    for optimizer in OPTIMIZERS:
        grid = runs.grid(task, optimizer)
        if grid:
            finals = [result.final for result in grid.values()]
            best, worst = min(finals), max(finals)
            each = "  ".join(f"{lr:g}: {_loss(result.final).strip()}" for lr, result in grid.items())
            yield f"    {optimizer:{_NAME_WIDTH}}  {_loss(best)} {_loss(worst)} {worst / best - 1:+8.1%}   {each}"
    yield ""


def _seeds(runs: Runs, task: str) -> Iterator[str]:
    yield f"{task}, {runs.steps(task)} steps, at the best learning rate and ours at the default"
    yield f"    {'':{_NAME_WIDTH}}       lr seeds    mean  spread  to AdamW  CPU ms a step   AdamW's loss after"
    for optimizer in OPTIMIZERS:
        for lr in rates_on_seeds(runs, task, optimizer):
            found = runs.seeds(task, optimizer, lr)
            if not found:
                continue
            finals = [result.final for result in found.values()]
            mean = statistics.mean(finals)
            spread = (max(finals) - min(finals)) / mean
            yield (
                f"    {optimizer:{_NAME_WIDTH}} {lr:8g} {len(found):5} {_loss(mean)} {spread:7.1%}"
                f" {_mean_to_reference(runs, task, found):+9.2%} {runs.step_milliseconds(task, optimizer):14.1f}"
                f"   {_by_seed(runs, task, found)}"
            )
    yield ""


def _goals(runs: Runs, task: str) -> Iterator[str]:
    """The goals of the study and whether they are met."""
    reference = runs.reference(task, 0)
    if reference is None or not runs.best_rate(task, PLAIN):
        return
    yield f"{task}: goals"
    for goal, where, only in ((0.7, "at its best", None), (0.9, "at the default lr", DEFAULT_RATE)):
        candidates = [
            (_median_share(runs, task, found), _mean_to_reference(runs, task, found), name, lr)
            for name in FAMILY
            for lr in rates_on_seeds(runs, task, name)
            if only in (None, lr) and (found := runs.seeds(task, name, lr))
        ]
        if candidates:
            share, excess, name, lr = min(candidates)
            yield f"    the best of ours {where}, {name}, lr {lr:g}: {excess:+.1%} to tuned AdamW at the end;"
            seeds = _by_seed(runs, task, runs.seeds(task, name, lr))
            verdict = _met(share <= goal)
            yield f"        its loss after at most {goal} of the run, in the median of the seeds: {verdict} ({seeds})"
    for name in FAMILY:
        grid = runs.grid(task, name)
        if set(FAMILY_RATES) <= grid.keys():
            worst = max(result.final for result in grid.values()) / reference.final - 1
            verdict = _met(worst <= 0.03)
            yield f"    {name}, worst from 1e-6 to 1e-3 to tuned AdamW {worst:+.1%} (at most +3 %): {verdict}"
    best, default = runs.grid(task, PLAIN), runs.grid(task, CONTEXTUAL).get(DEFAULT_RATE)
    if default is not None:
        excess = default.final / min(result.final for result in best.values()) - 1
        yield f"    contextual at the default to plain at its best {excess:+.1%} (at most +5 %): {_met(excess <= 0.05)}"
    for full, coded in ((PLAIN, PLAIN_8BIT), (CONTEXTUAL, CONTEXTUAL_8BIT)):
        for lr in rates_on_seeds(runs, task, full):
            pairs = list(zip(runs.seeds(task, full, lr).values(), runs.seeds(task, coded, lr).values()))
            if pairs:
                excess = statistics.mean(b.final / a.final - 1 for a, b in pairs)
                verdict = _met(abs(excess) <= 0.01)
                yield f"    {coded} to 32-bit, lr {lr:g}, {len(pairs)} seeds: {excess:+.2%} (1 %): {verdict}"
    yield ""


def _variants(runs: Runs, task: str) -> Iterator[str]:
    for title, cases, seeds, names in (
        ("a technique left out or alone", CASES[:2], 1, (*LEFT_OUT, *CONTEXT_LEFT_OUT, *ALONE)),
        ("the length of the warm-up, which is half of the run elsewhere", CASES[:2], 3, WARMUPS),
        ("other formulas", CASES, 2, CONTEXT_FORMULAS),
    ):
        columns = [Run(task, optimizer, lr, seed) for optimizer, lr in cases for seed in range(seeds)]
        yield from _changes(runs, f"{task}: {title}; change of the loss at the end", columns, names)


def _options(runs: Runs, task: str) -> Iterator[str]:
    cases = [case for case in OPTION_CASES if runs.seeds(task, case[0], DEFAULT_RATE, case[1])]
    reference = runs.reference(task, 0)
    if reference is None or all(name == AS_IT_IS for _, name in cases):
        return
    width = max(map(len, OPTIONS)) + 2
    yield f"{task}: {CONTEXTUAL} with other options, from {DEFAULT_RATE:g}; and the worst from 1e-6 to 1e-3, seed 0"
    yield f"    {'':{width}} seeds    mean  spread  to AdamW  worst to AdamW   AdamW's loss after"
    for optimizer, name in cases:
        found = runs.seeds(task, optimizer, DEFAULT_RATE, name)
        finals = [result.final for result in found.values()]
        mean = statistics.mean(finals)
        grid = [runs[run].final for lr in FAMILY_RATES if (run := Run(task, optimizer, lr, 0, name)) in runs]
        worst = f"{max(grid) / reference.final - 1:+.1%}" if len(grid) == len(FAMILY_RATES) else ""
        label = (name or "as it is") + (", 8-bit" if optimizer == CONTEXTUAL_8BIT else "")
        yield (
            f"    {label:{width}} {len(found):5} {_loss(mean)} {(max(finals) - min(finals)) / mean:7.1%}"
            f" {_mean_to_reference(runs, task, found):+9.2%} {worst:>15}   {_by_seed(runs, task, found)}"
        )
    yield ""


def _changes(runs: Runs, title: str, columns: list[Run], names: Collection[str]) -> Iterator[str]:
    """A table of how variants change the final loss of some runs."""
    columns = [run for run in columns if run in runs and any(_varied(run, name) in runs for name in names)]
    varied = [name for name in names if any(_varied(run, name) in runs for run in columns)]
    if not varied:
        return
    width = max(map(len, varied))
    yield title
    yield f"    {'':{width}}" + "".join(f"{_short(run):>{_CELL}}" for run in columns)
    yield f"    {'as it is':{width}}" + "".join(f"{_loss(runs[run].final):>{_CELL}}" for run in columns)
    for name in varied:
        cells = []
        for run in columns:
            other = _varied(run, name)
            cells.append(f"{runs[other].final / runs[run].final - 1:+.1%}" if other in runs else "")
        yield (f"    {name:{width}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)).rstrip()
    yield ""


def _varied(run: Run, variant: str) -> Run:
    return Run(run.task, run.optimizer, run.lr, run.seed, variant)


def _short(run: Run) -> str:
    """Kind of the optimizer, learning rate and seed."""
    kind = "contextual" if run.optimizer == CONTEXTUAL else "plain"
    return f"{kind} {run.lr:g}, {run.seed}"


def shares_of_steps(runs: Runs, task: str, found: Mapping[int, Result]) -> list[float]:
    """For each seed, the share of the run after which tuned AdamW's final loss of that seed is reached."""
    references = {seed: runs.reference(task, seed) for seed in found}
    return [
        found[seed].steps_to(reference.final) / found[seed].steps[-1]
        for seed, reference in references.items()
        if reference is not None
    ]


def _median_share(runs: Runs, task: str, found: Mapping[int, Result]) -> float:
    """The median, which is finite even if one seed of several never reaches the loss."""
    shares = shares_of_steps(runs, task, found)
    return statistics.median(shares) if shares else math.inf


def _by_seed(runs: Runs, task: str, found: Mapping[int, Result]) -> str:
    return "  ".join(
        f"{share:.2f}" if math.isfinite(share) else "never" for share in shares_of_steps(runs, task, found)
    )


def _mean_to_reference(runs: Runs, task: str, found: Mapping[int, Result]) -> float:
    pairs = [(result, runs.reference(task, seed)) for seed, result in found.items()]
    ratios = [result.final / reference.final - 1 for result, reference in pairs if reference is not None]
    return statistics.mean(ratios) if ratios else math.nan


def _loss(loss: float) -> str:
    return f"{loss:7.5f}" if loss < 1 else f"{loss:7.4f}"


def _met(met: bool) -> str:
    return "met" if met else "missed"

"""Do these optimizers reach lower held-out losses than six others at their best learning rates?

Two tasks, the embedded LoRA fine-tune and a small text model, are trained on one thread. The whole study takes hours.
Finished runs are written to a file, so that the command can be stopped and started again. `--print FILE` prints the
study in such a file and trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from .arguments import add_shared
from .study import pictures, plan, tables
from .study.finished import Finished
from .study.runs import DIGITS, STEPS, TEXT, Run, Runs

PARTS = ("grids", "seeds", "times", "ablations", "warmups", "formulas", "options")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--tasks", nargs="*", default=[DIGITS, TEXT], choices=[DIGITS, TEXT], help="tasks to train")
    parser.add_argument("--digits_steps", type=int, default=STEPS[DIGITS], help="steps of a LoRA fine-tune")
    parser.add_argument("--text_steps", type=int, default=STEPS[TEXT], help="steps of a text model's training")
    parser.add_argument(
        "--optimizers", nargs="*", default=plan.OPTIMIZERS, choices=plan.OPTIMIZERS,
        help="optimizers to train over their learning rates and on more seeds",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="parts of the study to train")
    add_shared(parser, seeds=5, results=Path("output/convergence.json"))
    parser.add_argument("--print", type=Path, metavar="FILE", help="print the study in this file and train nothing")
    parser.add_argument("--pictures", type=Path, default=Path("output/convergence"), help="folder of the pictures")


def run(args: argparse.Namespace) -> None:
    """Train what is asked for, then print and draw all that is known."""
    torch.set_num_threads(1)
    steps = {DIGITS: args.digits_steps, TEXT: args.text_steps}
    runs = Runs(Finished(args.print or args.results), steps)
    if not args.print:
        train(runs, args.tasks, args.parts, args.optimizers, args.seeds)
    for line in tables.all_tables(runs):
        print(line)
    pictures.save_all(runs, args.pictures)


def train(runs: Runs, tasks: list[str], parts: list[str], optimizers: list[str], seeds: int) -> None:
    """Train the runs that are asked for and not yet finished."""
    for part in parts:
        for task in tasks:
            if part == "grids":
                plan.make_grids(runs, task, optimizers)
            elif part == "times":
                runs.time_steps(task, optimizers)
            elif part == "seeds":
                plan.make_seeds(runs, task, optimizers, seeds)
            else:
                for run in wanted(part, task, seeds):
                    runs.make(run)


def wanted(part: str, task: str, seeds: int) -> Iterator[Run]:
    """The runs of a part of the study that does not depend on the results of other parts."""
    if part == "ablations":
        yield from plan.ablations(task)
    elif part == "warmups":
        for seed in range(min(seeds, 3)):
            yield from plan.warmups(task, seed)
    elif part == "options":
        for seed in range(seeds):
            yield from plan.options(task, seed)
    else:
        for seed in range(min(seeds, 2)):
            yield from plan.formulas(task, seed)

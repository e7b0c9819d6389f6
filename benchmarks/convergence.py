"""Do they train better? Held-out losses of two tasks beside six other optimizers, each at its best learning rate.

    python -m benchmarks.convergence                                            train what is not kept, then print
    python -m benchmarks.convergence --kept benchmarks/results/convergence.json  print a kept study, train nothing

Everything runs on one thread. Finished runs are kept in a file, so that the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from .study import pictures, plan, tables
from .study.kept import Kept
from .study.runs import DIGITS, STEPS, TEXT, Run, Runs

PARTS = ("grids", "seeds", "times", "ablations", "warmups", "formulas", "options")


def train(runs: Runs, tasks: list[str], parts: list[str], optimizers: list[str], seeds: int) -> None:
    """Make the runs that are asked for."""
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
    """The runs of a part of the study that do not depend on the results of others."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", default=[DIGITS, TEXT], choices=[DIGITS, TEXT], help="which tasks")
    parser.add_argument("--digits_steps", type=int, default=STEPS[DIGITS], help="steps of a LoRA fine-tune")
    parser.add_argument("--text_steps", type=int, default=STEPS[TEXT], help="steps of a text model's training")
    parser.add_argument(
        "--optimizers", nargs="*", default=plan.OPTIMIZERS, choices=plan.OPTIMIZERS, help="which in grids and seeds"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds at the best learning rate")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="which parts of the study to train")
    parser.add_argument("--results", default="output/convergence.json", help="file of finished runs")
    parser.add_argument("--kept", help="print the study in this file, and train nothing")
    parser.add_argument("--pictures", default="output/convergence", help="folder of the pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {DIGITS: args.digits_steps, TEXT: args.text_steps}
    runs = Runs(Kept(Path(args.kept or args.results)), steps)
    if not args.kept:
        train(runs, args.tasks, args.parts, args.optimizers, args.seeds)
    for line in tables.all_tables(runs):
        print(line)
    pictures.save_all(runs, Path(args.pictures))


if __name__ == "__main__":
    main()

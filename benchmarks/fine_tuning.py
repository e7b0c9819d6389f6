"""Without a learning rate to choose: how close to AdamW at its best rate, under the schedules that people use?

Four fine-tunes of pretrained models, each as a LoRA and of all weights, with a constant rate and with a cosine, and the
contextual optimizers with all defaults beside AdamW and others at the best rate of a grid. Grids are tried on the first
seed, and extended while the best rate is at an edge. Finished runs are written to a file, so that the command can be
stopped and started again; `--print FILE` prints what is known and trains nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .arguments import add_shared
from .study import protocol
from .study.finished import Finished
from .study.schedules import SCHEDULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--tasks", nargs="*", default=list(protocol.TASKS), choices=protocol.TASKS, help="what to train"
    )
    parser.add_argument(
        "--schedules", nargs="*", default=list(SCHEDULES), choices=SCHEDULES, help="of the learning rate"
    )
    parser.add_argument("--lengths", nargs="*", type=int, default=[100, 400, 1600], help="steps of a run")
    parser.add_argument(
        "--contenders", nargs="*", default=list(protocol.CONTENDERS), choices=protocol.CONTENDERS, help="beside AdamW"
    )
    add_shared(parser, seeds=8, results=Path("output/fine_tuning.json"))
    parser.add_argument("--print", type=Path, metavar="FILE", help="print what is in this file and train nothing")


def run(args: argparse.Namespace) -> None:
    """Train what is asked for, then print all that is known."""
    torch.set_num_threads(1)
    study = protocol.Study(Finished(args.print or args.results))
    cases = [
        protocol.Case(task, steps, schedule)
        for steps in args.lengths
        for task in args.tasks
        for schedule in args.schedules
    ]
    if not args.print:
        for seed in range(args.seeds):
            for case in cases:
                study.train(case, args.contenders, seed)
    for case in cases:
        for line in study.table(case):
            print(line)

"""Which operations take the time of a step, phase by phase?

For each phase the twelve operations with the largest shares of the time of all operations; in parentheses, how often a
step runs each.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from . import contenders
from .arguments import add_shared
from .models import load, parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, model="sd15_lora16", rounds=10, threads=2)
    parser.add_argument(
        "--optimizer", choices=contenders.FAMILY, default=contenders.FAMILY[0], help="the optimizer to profile"
    )


def run(args: argparse.Namespace) -> None:
    """Profile and print."""
    torch.set_num_threads(args.threads)
    for name, build in contenders.in_phases(args.optimizer).items():
        found = shares(build(parameters(load(args.model))), args.rounds)
        largest = sorted(found.items(), key=lambda item: -item[1][0])[:12]
        print(f"{name}: " + ", ".join(f"{op} {share:.0%} ({count:.0f})" for op, (share, count) in largest), flush=True)


def shares(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, tuple[float, float]]:
    """For each operation, its share of the time of all of them and how often a step runs it."""
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            optimizer.step()
    events = [event for event in recorded.key_averages() if event.key.startswith("aten::")]
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key[6:]: (event.self_cpu_time_total / total, event.count / steps) for event in events}

"""What do steps inside the backward pass cost, beside ordinary steps of the same optimizer?

The same gradients, stepped parameter by parameter or all together, after the warm-up, in turn. Printed: medians, and
the ratio of the first to the second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from library import automagic_cameamp as family

from .arguments import add_shared
from .contenders import FAMILY
from .models import load, parameters
from .table import Table

_LARGEST = 100_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, model="sdxl_full", rounds=9, threads=2)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    torch.set_num_threads(args.threads)
    shapes = load(args.model, _LARGEST)
    total = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"{args.model}: {len(shapes)} tensors, {total / 1e6:.1f} M parameters, {args.threads} threads")
    table = Table("{:<32}{:>16.1f}{:>16.1f}{:>8.2f}", "", "in backward ms", "ordinary ms", "ratio")
    for name in FAMILY:
        optimizers = [getattr(family, name)(parameters(shapes), warmup_steps=0) for _ in range(2)]
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(args.rounds + 2):
            for optimizer, one_by_one, found in zip(optimizers, (True, False), times):
                seconds = _seconds(optimizer, one_by_one)
                if number >= 2:  # The first ones make states and compile.
                    found.append(seconds * 1000)
        in_backward, ordinary = map(statistics.median, times)
        table.row(name, in_backward, ordinary, in_backward / ordinary)


def _seconds(optimizer: Any, one_by_one: bool) -> float:
    gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]

    def step_each(_: torch.Tensor) -> None:
        for group in optimizer.param_groups:
            for index in reversed(range(len(group["params"]))):
                optimizer.step_parameter(group["params"][index], group, index)

    # A backward pass of nothing else: its own time is none of the steps'.
    root = torch.zeros((), requires_grad=True)
    if one_by_one:
        root.register_hook(step_each)
    begin = time.perf_counter()
    root.backward()
    optimizer.step()
    seconds = time.perf_counter() - begin
    for p, gradient in gradients:
        p.grad = gradient
    return seconds

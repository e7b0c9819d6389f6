"""Why do the ratios measured with two threads differ from run to run?

Because two cores may or may not share a cache. One line a second: the time of a step of the base optimizer with two
threads and with one, of torch's AdamW with two, and of copying 24 MB with two threads and with one. If two threads copy
in half the time of one or less, each core has a cache of its own. What one thread gathers from small tensors and the
other goes on with then has to cross from one cache to the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import contenders
from .contenders import REFERENCE
from .models import load
from .step_time import started
from .table import Table

_COPIED = 6_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--lines", type=int, default=20, help="lines to print (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    shapes = load("sd15_lora16")
    base, build = next(iter(contenders.in_phases(contenders.FAMILY[0], ("after",)).items()))
    base_step, adamw_step = started(build, shapes), started(contenders.peer(REFERENCE), shapes)
    source, target = torch.ones(_COPIED), torch.zeros(_COPIED)

    def copy() -> None:
        target.copy_(source)

    table = Table(
        "{:<8}{:>38.1f}{:>10.1f}{:>24.1f}{:>10.2f}{:>10.2f}",
        "ms", f"{base}, 2 threads", "1 thread", f"{REFERENCE}, 2", "copy, 2", "copy, 1",
    )  # fmt: skip
    for number in range(args.lines):
        measured = ((base_step, 2), (base_step, 1), (adamw_step, 2), (copy, 2), (copy, 1))
        table.row(number, *(milliseconds(step, threads) for step, threads in measured))
        time.sleep(1)


def milliseconds(step: Callable[[], Any], threads: int) -> float:
    """The median of five steps, after two that are not measured."""
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])

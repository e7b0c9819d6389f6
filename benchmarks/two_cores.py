"""Why the ratios of two threads differ from run to run: whether both cores share a cache.

    python -m benchmarks.two_cores [--rounds 20]

A line a second: the time of a step of the base optimizer with two threads and with one, of torch's AdamW, and of
copying 24 MB. Where two threads copy in half the time of one or less, each has a cache of its own to do it in. Then
what one thread gathers of small tensors, and the other goes on with, has to cross from cache to cache.
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
from .growth import started
from .models import load

_COPIED = 6_000_000


def milliseconds(step: Callable[[], Any], threads: int) -> float:
    """The median of five steps, after two that are not measured."""
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_cores", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="lines to print")
    args = parser.parse_args()
    shapes = load("sd15_lora16")
    base, build = next(iter(contenders.ours(contenders.OURS[0], ("after",)).items()))
    ours, adamw = started(build, shapes), started(contenders.peer(REFERENCE), shapes)
    source, target = torch.ones(_COPIED), torch.zeros(_COPIED)

    def copy() -> None:
        target.copy_(source)

    print(f"{'ms':8}{base + ', 2 threads':>38}{'1 thread':>10}{REFERENCE + ', 2':>24}{'copy, 2':>10}{'copy, 1':>10}")
    for number in range(args.rounds):
        times = [milliseconds(*what) for what in ((ours, 2), (ours, 1), (adamw, 2), (copy, 2), (copy, 1))]
        print(
            f"{number:<8}{times[0]:38.1f}{times[1]:10.1f}{times[2]:24.1f}{times[3]:10.2f}{times[4]:10.2f}", flush=True
        )
        time.sleep(1)


if __name__ == "__main__":
    main()

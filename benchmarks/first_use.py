"""How long does the first use of an optimizer take, while kernels are compiled, and later ones, which find them kept?

Seconds of six steps in all phases, each time in a new process: of one tensor that a thread steps by itself, and of that
and a large one that threads share. Importing is not part of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .contenders import FAMILY
from .table import Table

_SMALL, _LARGE = ((64, 64),), ((64, 64), (640, 640))

_STEPS = """
import sys, time
import numba
import torch
import library.automagic_cameamp as family

params = [torch.nn.Parameter(torch.ones(eval(shape))) for shape in sys.argv[2:]]
for p in params:
    p.grad = torch.ones_like(p)
optimizer = getattr(family, sys.argv[1])(params, warmup_steps=4, fused=True)
begin = time.perf_counter()
for _ in range(6):
    optimizer.step()
print(time.perf_counter() - begin)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--only", default="", help="measure only the optimizers with a name that contains this text")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    table = Table(
        "{:<30}{:>12.1f}{:>8.1f}{:>20.1f}{:>8.1f}", "seconds", "first use", "kept", "with a large tensor", "kept"
    )
    for name in FAMILY:
        if args.only in name:
            table.row(name, *(seconds for shapes in (_SMALL, _LARGE) for seconds in first_and_later(name, shapes)))


def first_and_later(name: str, shapes: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Seconds of steps by kernels that are compiled meanwhile, and of the same by kernels that are kept on disk."""
    words = [sys.executable, "-c", _STEPS, name, *map(str, shapes)]
    with tempfile.TemporaryDirectory() as folder:
        environment, checkout = {**os.environ, "NUMBA_CACHE_DIR": folder}, Path(__file__).parents[1]
        runs = [subprocess.check_output(words, env=environment, cwd=checkout, text=True) for _ in range(2)]
    first, later = (float(printed.split()[-1]) for printed in runs)
    return first, later

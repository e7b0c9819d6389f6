"""How long does the first use of an optimizer take, while kernels are compiled, and later ones, which find them kept?

    python -m benchmarks first_use
    python -m benchmarks first_use --chip 86    of a GPU of this compute capability, which need not be there

On a CPU, seconds of six steps in all phases, each time in a new process: of one tensor that a thread steps by itself,
and of that and a large one that threads share. Importing is not part of it.

Of a GPU, seconds in which one core compiles what the second step of each phase launches and no phase before it did, of
a LoRA of SDXL. It needs Triton.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from . import contenders, kernels
from .contenders import FAMILY
from .models import load, parameters
from .table import Table

if TYPE_CHECKING:  # It needs Triton, which the options do not.
    from .compiled import Launch

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
    parser.add_argument("--chip", type=int, help="the compute capability of a GPU, in place of the CPU")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    names = [name for name in FAMILY if args.only in name]
    if args.chip:
        print_of_gpu(names, args.chip)
        return
    table = Table(
        "{:<30}{:>12.1f}{:>8.1f}{:>20.1f}{:>8.1f}", "seconds", "first use", "kept", "with a large tensor", "kept"
    )
    for name in names:
        table.row(name, *(seconds for shapes in (_SMALL, _LARGE) for seconds in first_and_later(name, shapes)))


def first_and_later(name: str, shapes: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Seconds of steps by kernels that are compiled meanwhile, and of the same by kernels that are kept on disk."""
    words = [sys.executable, "-c", _STEPS, name, *map(str, shapes)]
    with tempfile.TemporaryDirectory() as folder:
        environment, checkout = {**os.environ, "NUMBA_CACHE_DIR": folder}, Path(__file__).parents[1]
        runs = [subprocess.check_output(words, env=environment, cwd=checkout, text=True) for _ in range(2)]
    first, later = (float(printed.split()[-1]) for printed in runs)
    return first, later


def print_of_gpu(names: list[str], chip: int) -> None:
    """Compile for a GPU, phase after phase, and print seconds."""
    kernels.require_triton()
    table = Table("{:<48}{:>10}{:>10.1f}", "optimizer and phase", "compiled", "seconds")
    for name in names:
        known: set[Launch] = set()
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder):
            for title, build in contenders.in_phases(name).items():
                optimizer = build(parameters(load("sdxl_lora16", kernels.ELEMENTS)))
                launches = {launch for launch, _ in kernels.recorded(optimizer, steps=2)} - known
                known |= launches
                table.row(title, len(launches), seconds_to_compile(launches, chip))


def seconds_to_compile(launches: set[Launch], chip: int) -> float:
    """Seconds in which some kernels are compiled one after the other."""
    from .compiled import build

    begin = time.perf_counter()
    for launch in launches:
        build(launch, chip)
    return time.perf_counter() - begin

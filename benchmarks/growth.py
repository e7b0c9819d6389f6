"""How does the time of a step grow with the model and with the number of its tensors?

For torch's AdamW and for the four optimizers after their warm-up: the time a parameter on an SDXL LoRA, as a ratio to
that on an SD 1.5 LoRA; and the time on the tensors of an SDXL LoRA, as a ratio to that on a tenth as many tensors, each
of which holds ten of the originals.

Then, for each phase, the time of an optimizer as a ratio to another with which it takes its steps in turns: the plain
optimizers to the AdamW of the same precision, the contextual ones to the plain ones, with and without multi-scale
momenta. The ratio is the median of the rounds, with their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from . import contenders
from .arguments import add_shared
from .contenders import REFERENCE, Build
from .models import load
from .step_time import interleaved, started
from .table import Table

Shapes = list[tuple[int, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, rounds=15, threads=2)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    torch.set_num_threads(args.threads)
    small, large = load("sd15_lora16"), load("sdxl_lora16")
    _print_growth(small, large, args.rounds)
    table = Table("{:<36}" + "{:>28}" * len(contenders.PHASES), "in turns", *contenders.PHASES)
    for bits, adamw in (("", REFERENCE), ("8bit", "bitsandbytes AdamW8bit")):
        for model, shapes in (("SD 1.5", small), ("SDXL", large)):
            ratios_of: dict[str, list[str]] = {"plain / AdamW": [], "context / plain": [], "the same, no momenta": []}
            for phase in contenders.PHASES:
                contextual = f"Automagic_CameAMP_COptim{bits}"
                (plain,) = contenders.in_phases(f"Automagic_CameAMP{bits}", (phase,)).values()
                (whole,) = contenders.in_phases(contextual, (phase,)).values()
                (without,) = contenders.in_phases(contextual, (phase,), momentum_scales=()).values()
                pairs = ((contenders.peer(adamw), plain), (plain, whole), (plain, without))
                for found, (first, second) in zip(ratios_of.values(), pairs):
                    found.append(in_turns(first, second, shapes, args.rounds))
            for name, found in ratios_of.items():
                table.row(f"{'8' if bits else '32'}-bit, {model}: {name}", *found)


def _print_growth(small: Shapes, large: Shapes, rounds: int) -> None:
    few, many = tenths(large)
    counts = {id(shapes): sum(torch.Size(s).numel() for s in shapes) for shapes in (small, large, many)}
    larger = counts[id(large)] / counts[id(small)]
    builds = {REFERENCE: contenders.peer(REFERENCE)}
    for name in contenders.FAMILY:
        builds |= contenders.in_phases(name, ("after",))
    print(f"an SDXL LoRA has {larger:.2f} times the elements of an SD 1.5 LoRA; {len(few)} or {len(many)} tensors of "
          f"{counts[id(many)] / 1e6:.1f} M elements")  # fmt: skip
    table = Table(
        "{:<36}{:>12.1f}{:>28.2f}{:>24.2f}", "", "ms on SDXL", "a parameter, SDXL / SD 1.5", "ten times the tensors"
    )
    for name, build in builds.items():
        milliseconds, growth = ratios(started(build, small), started(build, large), rounds)
        _, split = ratios(started(build, few), started(build, many), rounds)
        table.row(name, milliseconds, statistics.median(growth) / larger, statistics.median(split))


def tenths(shapes: Shapes) -> tuple[Shapes, Shapes]:
    """The same elements in few tensors and in ten times as many. Of each shape, a multiple of ten tensors is used."""
    few: Shapes = []
    many: Shapes = []
    for (rows, *columns), count in Counter(shapes).items():
        few += [(10 * rows, *columns)] * (count // 10)
        many += [(rows, *columns)] * (count // 10 * 10)
    return few, many


def ratios(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, list[float]]:
    """Milliseconds of the second step, the median over rounds, and its ratio to the first in each round."""
    seconds = interleaved({"first": first, "second": second}, rounds)
    return 1e3 * statistics.median(seconds["second"]), [b / a for a, b in zip(seconds["first"], seconds["second"])]


def in_turns(first: Build, second: Build, shapes: Shapes, rounds: int) -> str:
    """The second optimizer's time as a ratio to the first's: median and quartiles of the rounds."""
    _, found = ratios(started(first, shapes), started(second, shapes), rounds)
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"

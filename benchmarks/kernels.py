"""What does the GPU code of a step ask of a GPU: launches, registers, and bytes a parameter beside the least possible?

    python -m benchmarks kernels
    python -m benchmarks kernels --model sdxl_lora16 --chips 86 89

Needs Triton and no GPU: kernels are compiled ahead for each chip, and nothing runs. Bytes are those of gradients,
weights and states, counted in the compiled code; the floor is every one of them read once and, if it changes, written
once. Passes over sums, over the rows of weights and over matrices of low rank come on top where the table says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from . import contenders
from .compiled import Code, Launch, Recorder, compiled, launching
from .models import load, parameters
from .table import Table

CHIPS = (75, 80, 86, 89, 90, 100, 120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--chips", type=int, nargs="*", default=CHIPS, help="compute capabilities (default: all)")
    parser.add_argument("--model", default="sdxl_lora16", help="the model whose tensors are launched for")
    parser.add_argument("--limit", type=int, default=1_000_000, help="elements of it; launches do not depend on it")


def run(args: argparse.Namespace) -> None:
    """Compile and print."""
    shapes = load(args.model, args.limit)
    table = Table("{:<46}{:>9}{:>11}{:>9}{:>8}{:>8}", "optimizer and phase", "launches", "registers", "spilled", "read",
                  "written")  # fmt: skip
    known: dict[tuple[Launch, int], Code] = {}
    for name in contenders.FAMILY:
        for title, build in contenders.in_phases(name).items():
            launches = recorded(build(parameters(shapes)))
            codes = [code for launch, _ in launches for code in _compiled(launch, args.chips, known)]
            first = [known[launch, args.chips[0]] for launch, _ in launches]
            table.row(
                title, len(launches), max(code.registers for code in codes), sum(code.spilled for code in codes),
                f"{sum(code.read or 0 for code in first):g}", f"{sum(code.written or 0 for code in first):g}",
            )  # fmt: skip


def recorded(optimizer: Any) -> list[tuple[Launch, int]]:
    """What a step of an optimizer launches, with the number of programs."""
    recorder = Recorder()
    with launching(recorder):
        optimizer.step()
    return recorder.recorded


def _compiled(launch: Launch, chips: list[int], known: dict[tuple[Launch, int], Code]) -> Iterator[Code]:
    for chip in chips:
        if (launch, chip) not in known:
            known[launch, chip] = compiled(launch, chip)
        yield known[launch, chip]

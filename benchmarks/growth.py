"""How the time of a step grows: with the model, with the number of its tensors, and over what the user has now.

    python -m benchmarks.growth [--rounds 15]

For each of ours and for torch's AdamW, after the warm-up: the time a parameter on an SDXL LoRA, as a ratio to that on
an SD 1.5 LoRA, and the time of a step with each tensor of an SDXL LoRA alone, as a ratio to that with ten of them, one
above the other, as one. Then, in each phase, ratios of two optimizers that take their steps in turns: ours to the AdamW
of the same bits, and the contextual ones to the plain ones, with and without multi-scale momenta.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from library.cameamp.workspace import keep_freed_memory

from . import contenders
from .contenders import REFERENCE, Build
from .models import load, parameters
from .step_time import interleaved

Shapes = list[tuple[int, ...]]


def tenths(shapes: Shapes) -> tuple[Shapes, Shapes]:
    """The same elements in few tensors and in ten times as many: those of each shape that there are tens of."""
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


def started(build: Build, shapes: Shapes) -> Callable[[], Any]:
    """The step of an optimizer that has taken one."""
    optimizer = build(parameters(shapes))
    optimizer.step()
    return optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each optimizer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as ours have it, for all alike
    small, large = load("sd15_lora16"), load("sdxl_lora16")
    few, many = tenths(large)
    counts = {id(shapes): sum(torch.Size(s).numel() for s in shapes) for shapes in (small, large, many)}
    larger = counts[id(large)] / counts[id(small)]
    builds = {REFERENCE: contenders.peer(REFERENCE)}
    for name in contenders.OURS:
        builds |= contenders.ours(name, ("after",))
    print(f"an SDXL LoRA has {larger:.2f} times the elements of an SD 1.5 LoRA; {len(few)} or {len(many)} tensors of "
          f"{counts[id(many)] / 1e6:.1f} M elements")  # fmt: skip
    print(f"{'':36}{'ms on SDXL':>12}{'a parameter, SDXL / SD 1.5':>28}{'ten times the tensors':>24}")
    for name, build in builds.items():
        milliseconds, growth = ratios(started(build, small), started(build, large), args.rounds)
        _, split = ratios(started(build, few), started(build, many), args.rounds)
        growth_each = statistics.median(growth) / larger
        print(f"{name:36}{milliseconds:12.1f}{growth_each:28.2f}{statistics.median(split):24.2f}", flush=True)
    print(f"{'in turns':36}" + "".join(f"{phase:>28}" for phase in contenders.PHASES))
    for bits, adamw in (("", REFERENCE), ("8bit", "bitsandbytes AdamW8bit")):
        for model, shapes in (("SD 1.5", small), ("SDXL", large)):
            table: dict[str, list[str]] = {"plain / AdamW": [], "context / plain": [], "the same, no momenta": []}
            for phase in contenders.PHASES:
                contextual = f"Automagic_CameAMP_COptim{bits}"
                (plain,) = contenders.ours(f"Automagic_CameAMP{bits}", (phase,)).values()
                (whole,) = contenders.ours(contextual, (phase,)).values()
                (without,) = contenders.ours(contextual, (phase,), momentum_scales=()).values()
                pairs = ((contenders.peer(adamw), plain), (plain, whole), (plain, without))
                for found, (first, second) in zip(table.values(), pairs):
                    found.append(in_turns(first, second, shapes, args.rounds))
            for name, found in table.items():
                row = f"{'8' if bits else '32'}-bit, {model}: {name}"
                print(f"{row:36}" + "".join(f"{text:>28}" for text in found), flush=True)


if __name__ == "__main__":
    main()

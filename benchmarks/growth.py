"""How the time of a step grows: with the model, and with the number of tensors that hold the same elements.

    python -m benchmarks.growth [--rounds 15]

After the warm-up, for each of ours and for torch's AdamW. The first ratio is of the times a parameter, on an SDXL LoRA
and on an SD 1.5 LoRA; the second is of the times of a step, with each tensor of an SDXL LoRA and with ten of them, one
above the other, as one.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

import torch

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


def ratio(build: Build, first: Shapes, second: Shapes, rounds: int) -> tuple[float, float]:
    """Milliseconds of a step on the second shapes, and its ratio to one on the first: the median over the rounds."""
    steps = {}
    for name, shapes in (("first", first), ("second", second)):
        optimizer = build(parameters(shapes))
        optimizer.step()
        steps[name] = optimizer.step
    seconds = interleaved(steps, rounds)
    pairs = zip(seconds["second"], seconds["first"])
    return 1e3 * statistics.median(seconds["second"]), statistics.median(b / a for b, a in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each optimizer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
        milliseconds, growth = ratio(build, small, large, args.rounds)
        _, split = ratio(build, few, many, args.rounds)
        print(f"{name:36}{milliseconds:12.1f}{growth / larger:28.2f}{split:24.2f}", flush=True)


if __name__ == "__main__":
    main()

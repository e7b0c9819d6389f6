"""Time of a step in each phase, as a ratio to torch's AdamW, beside other peers in the same run.

    python -m benchmarks.step_time [--model sd15_lora16] [--rounds 15]

Needs requirements-benchmarks.txt. Steps of all optimizers are interleaved, so that a slow moment of the machine hits
all of them; the median is reported, with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)

from .cost import operations, state_bytes, temporary_bytes
from .models import NAMES, load, parameters

_PEER = "torch AdamW foreach"


def contenders(shapes: list[tuple[int, ...]]) -> dict[str, torch.optim.Optimizer]:
    """The optimizers to compare, each on parameters of its own; ours in the phase that its name says."""
    from bitsandbytes.optim import AdamW8bit
    from pytorch_optimizer import CAME

    made: dict[str, torch.optim.Optimizer] = {
        _PEER: torch.optim.AdamW(parameters(shapes), lr=1e-6, foreach=True),
        "pytorch_optimizer CAME": CAME(parameters(shapes), lr=1e-6),
        "bitsandbytes AdamW8bit": AdamW8bit(parameters(shapes), lr=1e-6),
    }
    for ours in (
        Automagic_CameAMP, Automagic_CameAMP_COptim, Automagic_CameAMP8bit, Automagic_CameAMP_COptim8bit
    ):  # fmt: skip
        late = ours(parameters(shapes), warmup_steps=1_000_000)
        late.step()
        # Half of the warm-up is over once the step counter says so.
        for state in late.state.values():
            state["step"] = 600_000
        made[f"{ours.__name__}, early"] = ours(parameters(shapes), warmup_steps=1_000_000)
        made[f"{ours.__name__}, late warm-up"] = late
        made[f"{ours.__name__}, after"] = ours(parameters(shapes), warmup_steps=0)
    return made


def interleaved(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in `rounds` rounds of one step each after two unmeasured ones."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="sd15_lora16", help="whose shapes")
    parser.add_argument("--limit", type=int, help="at most this many elements of the model")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each optimizer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", default="", help="leave out contenders whose names lack this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = load(args.model, args.limit)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"{args.model}: {len(shapes)} tensors, {count / 1e6:.1f} M parameters, {args.threads} threads")
    optimizers = {n: o for n, o in contenders(shapes).items() if n == _PEER or args.only in n}
    seconds = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, args.rounds)
    peer = statistics.median(seconds[_PEER])
    print(f"{'':38}{'ratio':>7}{'quartiles':>15}{'ms':>9}{'operations':>12}{'state B/p':>11}{'temp MiB':>10}")
    for name, optimizer in optimizers.items():
        low, middle, high = statistics.quantiles(seconds[name], n=4)
        launched = operations(optimizer.step).counts.total()
        state, temporary = state_bytes(optimizer) / count, temporary_bytes(optimizer) / 2**20
        print(
            f"{name:38}{middle / peer:7.2f}{f'{low / peer:.2f} - {high / peer:.2f}':>15}{middle * 1e3:9.1f}"
            f"{launched:12}{state:11.2f}{temporary:10.1f}"
        )


if __name__ == "__main__":
    main()

"""Where the time of a step goes: the share of each kind of operation, in each phase.

python -m benchmarks.step_profile [--model sd15_lora16] [--optimizer Automagic_CameAMP]
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from . import contenders
from .models import NAMES, load, parameters


def shares(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, tuple[float, float]]:
    """For each operation, its share of the time of all of them and how often a step runs it."""
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            optimizer.step()
    events = [event for event in recorded.key_averages() if event.key.startswith("aten::")]
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key[6:]: (event.self_cpu_time_total / total, event.count / steps) for event in events}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="sd15_lora16", help="whose shapes")
    parser.add_argument("--optimizer", choices=contenders.OURS, default=contenders.OURS[0], help="which of ours")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each phase")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, build in contenders.ours(args.optimizer).items():
        found = shares(build(parameters(load(args.model))), args.steps)
        largest = sorted(found.items(), key=lambda item: -item[1][0])[:12]
        print(f"{name}: " + ", ".join(f"{op} {share:.0%} ({count:.0f})" for op, (share, count) in largest), flush=True)


if __name__ == "__main__":
    main()

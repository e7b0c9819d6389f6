"""How much of an 8-bit step goes into unpacking and packing states.

python -m benchmarks.storage_time
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from library.automagic_cameamp import Automagic_CameAMP8bit
from library.cameamp.batches import BatchStates

from .models import NAMES, load, parameters


class _Timed:
    """Adds up the time spent in a method."""

    def __init__(self, method: str) -> None:
        self.seconds = 0.0
        original = getattr(BatchStates, method)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(BatchStates, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="sd15_lora16", help="whose shapes")
    parser.add_argument("--steps", type=int, default=15, help="measured steps")
    args = parser.parse_args()
    torch.set_num_threads(2)
    reading, writing = _Timed("read"), _Timed("write")
    for phase, warmup_steps in (("early", 1_000_000), ("after", 0)):
        optimizer = Automagic_CameAMP8bit(parameters(load(args.model)), warmup_steps=warmup_steps)
        for _ in range(2):
            optimizer.step()
        reading.seconds = writing.seconds = 0.0
        start = time.perf_counter()
        for _ in range(args.steps):
            optimizer.step()
        total = time.perf_counter() - start
        shares = [reading.seconds / total, writing.seconds / total]
        print(
            f"{phase:6} unpacking {shares[0]:.0%}, packing {shares[1]:.0%}, all else {1 - sum(shares):.0%} of the step"
        )


if __name__ == "__main__":
    main()

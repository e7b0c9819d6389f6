"""Does it still matter which learning rate a contextual optimizer starts from?

The held-out loss of the embedded LoRA fine-tune. The contextual optimizers start from 1e-6, 1e-5, 1e-4 and 1e-3;
torch's AdamW runs at five learning rates, of which the best counts. `--parts` also switches parts of the contextual
optimizer off, one at a time, and starts from 1e-6 and 1e-3. Finished runs are written to a file, so that the
command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from .arguments import add_shared
from .contenders import FAMILY, REFERENCE
from .study.digits import DigitsLoRA
from .study.finished import Finished
from .study.optimizers import CONTEXTUAL, CONTEXTUAL_8BIT, FAMILY_RATES, builder
from .study.task import train
from .study.variants import CONTEXT_LEFT_OUT, Variant

ADAMW = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
NAMES = {32: CONTEXTUAL, 8: CONTEXTUAL_8BIT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, seeds=3, steps=200, results=Path("output/learning_rate_free.json"))
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="*", default=(32,), choices=NAMES, help="precision of the states")
    parser.add_argument("--parts", action="store_true", help="also switch parts off")


def run(args: argparse.Namespace) -> None:
    """Train and print."""
    finished = Finished(args.results)

    def after(optimizer: str, lr: float, seed: int, part: str = "") -> float:
        def make() -> dict[str, Any]:
            variant = CONTEXT_LEFT_OUT[part] if part else Variant()
            return trained(optimizer, lr, seed, args.steps, args.rank, variant)

        name = f"{optimizer} lr {lr:g} seed {seed} steps {args.steps} rank {args.rank} {part or 'as it is'}"
        return float(finished.get(name, make)["after"])

    for seed in range(args.seeds):
        rivals = {lr: after(REFERENCE, lr, seed) for lr in ADAMW}
        best = min(rivals.values())
        print(f"seed {seed}: AdamW " + "  ".join(f"{lr:g}: {loss:.5f}" for lr, loss in rivals.items()), flush=True)
        for bits in args.bits:
            ends = [after(NAMES[bits], lr, seed) for lr in FAMILY_RATES]
            print(
                f"   {bits:2} bits, from "
                + "  ".join(f"{lr:g}: {loss:.5f}" for lr, loss in zip(FAMILY_RATES, ends))
                + f"   spread {max(ends) / min(ends) - 1:.2%}, mean {statistics.mean(ends) / best - 1:+.2%}, "
                f"worst {max(ends) / best - 1:+.2%} to the best AdamW",
                flush=True,
            )
        if args.parts:
            for part in CONTEXT_LEFT_OUT:
                ends = [after(CONTEXTUAL, lr, seed, part) for lr in (1e-6, 1e-3)]
                print(f"   {part}: from 1e-6: {ends[0]:.5f}, from 1e-3: {ends[1]:.5f}", flush=True)


def trained(optimizer: str, lr: float, seed: int, steps: int, rank: int, variant: Variant) -> dict[str, Any]:
    """Train once. Returns the held-out loss at the end."""
    own = {"warmup_steps": steps // 2, **variant.options} if optimizer in FAMILY else {}
    task = DigitsLoRA(seed, rank, batch_size=32, repeats=4)
    return {"after": train(task, builder(optimizer, lr, own, variant), steps, steps)[-1]}

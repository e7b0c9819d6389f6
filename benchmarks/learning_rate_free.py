"""Is there a learning rate to choose? Held-out loss of the embedded LoRA fine-tune from four of them, beside AdamW.

    python -m benchmarks.learning_rate_free [--seeds 3] [--steps 200] [--bits 32 8] [--parts] [--rank 16]

The contextual optimizers start from 1e-6, 1e-5, 1e-4 and 1e-3; torch's AdamW runs at five learning rates of its own,
and the best one counts. `--parts` switches parts of the contextual optimizer off, one at a time. Finished runs are kept
in a file, so that the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from library.cameamp import context, rules
from library.cameamp.storage import momenta
from library.cameamp_demo.options import parse
from library.cameamp_demo.trainer import Trainer

STARTS = (1e-6, 1e-5, 1e-4, 1e-3)
ADAMW = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
NAMES = {32: "Automagic_CameAMP_COptim", 8: "Automagic_CameAMP_COptim8bit"}


def run(optimizer_type: str, lr: float, seed: int, steps: int, rank: int, *options: str) -> dict[str, Any]:
    """Train once: the held-out losses at the start and at the end, and the course of the multiplier."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        ours = "CameAMP" in optimizer_type
        arguments = [
            "--optimizer_type", optimizer_type, "--seed", str(seed), "--max_train_steps", str(steps),
            "--output_dir", folder, "--learning_rate", str(lr), "--network_dim", str(rank),
            "--network_alpha", str(rank),
            "--optimizer_args", *((f"warmup_steps={steps // 2}",) if ours else ()), *options,
        ]  # fmt: skip
        trainer = Trainer(parse(arguments))
        optimizer = trainer.optimizer.optimizer
        before, multipliers = trainer.held_out_loss(), []
        for _ in range(steps):
            trainer._train_step()
            if hasattr(optimizer, "c_optim"):
                multipliers.append(optimizer.c_optim.compute_contextual_lr_multiplier())
        result: dict[str, Any] = {"before": before, "after": trainer.held_out_loss()}
        if multipliers:
            result["multipliers"] = multipliers[:: max(1, steps // 20)]
            result["edge_cases"] = optimizer.c_optim.edge_case_count
        return result


@contextlib.contextmanager
def without(part: str) -> Iterator[tuple[str, ...]]:
    """Switch a part of the contextual optimizer off; gives the options that this takes."""
    saved = rules.multi_scale_momentum, context._OFFSET, momenta.SMALLEST_CODED
    momenta.momentum_storages.cache_clear()
    try:
        if part == "multi-scale momentum":
            rules.multi_scale_momentum = lambda *_: None  # type: ignore[assignment]
        elif part == "offset":
            context._OFFSET = 0.0
        elif part == "codes of the momenta":
            momenta.SMALLEST_CODED = 2**62
        yield {"edge cases": ("edge_threshold=1.0",), "multiplier": ("adaptation_rate=0.0",)}.get(part, ())
    finally:
        rules.multi_scale_momentum, context._OFFSET, momenta.SMALLEST_CODED = saved
        momenta.momentum_storages.cache_clear()


class Kept:
    """Results by name, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept result, or a new one."""
        if name not in self.results:
            self.results[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.results), encoding="utf-8")
            os.replace(partial, self.path)
        return self.results[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run; the warm-up is half of them")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--bits", type=int, nargs="*", default=(32,), choices=NAMES, help="precision of the states")
    parser.add_argument("--parts", action="store_true", help="also switch parts off, one at a time, from 1e-6 and 1e-3")
    parser.add_argument("--kept", default="output/learning_rate_free.json", help="file of finished runs")
    args = parser.parse_args()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    kept = Kept(Path(args.kept))

    def after(optimizer_type: str, lr: float, seed: int, part: str = "") -> float:
        def make() -> dict[str, Any]:
            with without(part) as options:
                return run(optimizer_type, lr, seed, args.steps, args.rank, *options)

        name = f"{optimizer_type} lr {lr:g} seed {seed} steps {args.steps} rank {args.rank} without {part or 'nothing'}"
        return float(kept.get(name, make)["after"])

    for seed in range(args.seeds):
        rivals = {lr: after("AdamW", lr, seed) for lr in ADAMW}
        best = min(rivals.values())
        print(f"seed {seed}: AdamW " + "  ".join(f"{lr:g}: {loss:.5f}" for lr, loss in rivals.items()), flush=True)
        for bits in args.bits:
            ends = [after(NAMES[bits], lr, seed) for lr in STARTS]
            print(
                f"   {bits:2} bits, from "
                + "  ".join(f"{lr:g}: {loss:.5f}" for lr, loss in zip(STARTS, ends))
                + f"   spread {max(ends) / min(ends) - 1:.2%}, mean {statistics.mean(ends) / best - 1:+.2%}, "
                f"worst {max(ends) / best - 1:+.2%} to the best AdamW",
                flush=True,
            )
        if args.parts:
            for part in ("multi-scale momentum", "codes of the momenta", "edge cases", "offset", "multiplier"):
                ends = [after(NAMES[32], lr, seed, part) for lr in (1e-6, 1e-3)]
                print(f"   without {part}: from 1e-6: {ends[0]:.5f}, from 1e-3: {ends[1]:.5f}", flush=True)


if __name__ == "__main__":
    main()

"""Held-out loss of the embedded LoRA fine-tune with 8-bit states, as a ratio to 32-bit ones, at every evaluation.

    python -m benchmarks.eight_bit_quality [--contextual]

Rank 128, so that every factor has the 4,096 elements from which on states are quantized. The warm-up ends in mid-run.
"""

from __future__ import annotations

import argparse
import logging
import tempfile

from accelerate.state import AcceleratorState

from library.cameamp_demo.options import parse
from library.cameamp_demo.trainer import Trainer

_RANK = "128"


def held_out_losses(optimizer_type: str, seed: int, steps: int, *options: str) -> dict[int, float]:
    """Train once; step to held-out loss."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--optimizer_type", optimizer_type, "--seed", str(seed), "--max_train_steps", str(steps),
            "--output_dir", folder, "--learning_rate", "1e-4", "--network_dim", _RANK, "--network_alpha", _RANK,
            "--validate_every_n_steps", "50",
            "--optimizer_args", f"warmup_steps={steps // 2}", *options,
        ]  # fmt: skip
        trainer = Trainer(parse(arguments))
        trainer.train()
        return dict(trainer.history.held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run")
    parser.add_argument("--contextual", action="store_true", help="the contextual optimizers in place of the plain")
    args = parser.parse_args()
    name = "Automagic_CameAMP_COptim" if args.contextual else "Automagic_CameAMP"
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    worst = 0.0
    for seed in range(args.seeds):
        full = held_out_losses(name, seed, args.steps)
        small = held_out_losses(f"{name}8bit", seed, args.steps)
        ratios = {step: small[step] / full[step] for step in full}
        worst = max(worst, *(ratio - 1 for ratio in ratios.values()))
        print(f"seed {seed}: 32-bit ends at {full[args.steps]:.5f}, 8-bit at {small[args.steps]:.5f}; 8-bit / 32-bit:")
        print("   " + "  ".join(f"{step}: {ratio:.4f}" for step, ratio in ratios.items()), flush=True)
    print(f"largest excess of the 8-bit loss at any evaluation: {worst:+.2%}")


if __name__ == "__main__":
    main()

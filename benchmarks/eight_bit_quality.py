"""Do 8-bit states train as well as 32-bit ones?

The held-out loss of the embedded LoRA fine-tune with 8-bit states, as a ratio to that with 32-bit states, at every
evaluation. The warm-up ends halfway through the run.
"""

from __future__ import annotations

import argparse

from .arguments import add_shared
from .embedded import embedded_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, seeds=3, steps=400)
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--contextual", action="store_true", help="train with the contextual optimizers")


def run(args: argparse.Namespace) -> None:
    """Train and print."""
    name = "Automagic_CameAMP_COptim" if args.contextual else "Automagic_CameAMP"
    worst = 0.0
    for seed in range(args.seeds):
        full = held_out_losses(name, seed, args.rank, args.steps)
        small = held_out_losses(f"{name}8bit", seed, args.rank, args.steps)
        ratios = {step: small[step] / full[step] for step in full}
        worst = max(worst, *(ratio - 1 for ratio in ratios.values()))
        print(f"seed {seed}: 32-bit ends at {full[args.steps]:.5f}, 8-bit at {small[args.steps]:.5f}; 8-bit / 32-bit:")
        print("   " + "  ".join(f"{step}: {ratio:.4f}" for step, ratio in ratios.items()), flush=True)
    print(f"largest excess of the 8-bit loss at any evaluation: {worst:+.2%}")


def held_out_losses(optimizer_type: str, seed: int, rank: int, steps: int) -> dict[int, float]:
    """Train once. Returns the held-out losses by step."""
    arguments = [
        "--optimizer_type", optimizer_type, "--seed", str(seed), "--max_train_steps", str(steps),
        "--learning_rate", "1e-4", "--validate_every_n_steps", "50",
    ]  # fmt: skip
    with embedded_trainer(rank, steps // 2, *arguments) as trainer:
        trainer.train()
        return dict(trainer.history.held_out)

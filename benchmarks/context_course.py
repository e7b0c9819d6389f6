"""How does the multiplier behave on a bowl that is too steep, and on pure noise?

1. Quadratic bowls so steep that the optimizer without context oscillates at its max_lr: the final losses with context
   and without.
2. Pure noise, independent gradients of 65,536 elements: how far the multiplier drifts and how far the weights walk.
3. With --embedded, what that walk costs: the final loss of the embedded LoRA fine-tune with and without 100 steps of
   pure noise before it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP_COptim

from .arguments import add_shared
from .embedded import embedded_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, seeds=3, steps=300)
    parser.add_argument("--embedded", action="store_true", help="also train the embedded LoRA, for two minutes")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    for seed in range(args.seeds):
        without, with_context = (
            oscillation(c, seed, args.steps) for c in (Automagic_CameAMP, Automagic_CameAMP_COptim)
        )
        print(f"oscillation, seed {seed}: without context {without:.3g}, with {with_context:.3g}: "
              f"{with_context / without - 1:+.1%}", flush=True)  # fmt: skip
    marks = tuple(m for m in (25, 50, 100, 150, 200, 300) if m <= args.steps)
    for seed in range(args.seeds):
        courses = [noise(c, seed, args.steps, marks) for c in (Automagic_CameAMP, Automagic_CameAMP_COptim)]
        print(f"noise, seed {seed}: " + ", ".join(
            f"step {m}: multiplier {courses[1][m][0]:.3g}, way {courses[1][m][1]:.2g} (without context "
            f"{courses[0][m][1]:.2g})" for m in marks
        ), flush=True)  # fmt: skip
    if args.embedded:
        # Second moments and residuals remember the noise too. The optimizer without context shows what they cost.
        for name, lr in (("Automagic_CameAMP_COptim", 1e-6), ("Automagic_CameAMP", 1e-3)):
            alone, after = (embedded(name, lr, noise_steps, 200) for noise_steps in (0, 100))
            print(
                f"embedded LoRA, {name} from {lr:g}, 200 steps: {alone:.5f}; "
                f"after 100 steps of noise {after:.5f}: {after / alone - 1:+.2%}",
                flush=True,
            )


def oscillation(optimizer_class: type, seed: int, steps: int) -> float:
    """Final loss on a quadratic bowl whose optimum every step of max_lr oversteps."""
    generator = torch.Generator().manual_seed(seed)
    curvature = 10 ** (2 * torch.rand(64, 128, generator=generator))
    target = 0.02 * torch.randn(64, 128, generator=generator)
    p = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = optimizer_class([p], lr=1e-2, max_lr=1e-2, warmup_steps=steps // 2, full_finetune=True)
    for _ in range(steps):
        loss = (curvature * (p - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()
    return (curvature * (p.detach() - target) ** 2).mean().item()


def noise(optimizer_class: type, seed: int, steps: int, marks: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """At each of some steps, the multiplier and the root mean square of the weights' distance from their start."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(0.1 * torch.randn(256, 256, generator=generator))
    start = p.detach().clone()
    optimizer = optimizer_class([p], warmup_steps=steps // 2, full_finetune=True)
    result = {}
    for step in range(1, steps + 1):
        p.grad = torch.randn(256, 256, generator=generator)
        optimizer.report_loss(1 + 0.1 * torch.randn((), generator=generator))
        optimizer.step()
        if step in marks:
            multiplier = 1.0
            if isinstance(optimizer, Automagic_CameAMP_COptim):
                multiplier = optimizer.c_optim.compute_contextual_lr_multiplier()
            result[step] = multiplier, (p.detach() - start).square().mean().sqrt().item()
    return result


def embedded(name: str, lr: float, noise_steps: int, steps: int) -> float:
    """Held-out loss of the embedded LoRA fine-tune after `steps` steps, which follow on `noise_steps` of noise."""
    arguments = ["--optimizer_type", name, "--learning_rate", str(lr), "--seed", "0"]
    with embedded_trainer(16, noise_steps + steps // 2, *arguments) as trainer:
        step, generator = trainer.optimizer.optimizer.step, torch.Generator().manual_seed(0)

        def noisy(*arguments: Any) -> Any:
            for p in trainer.lora.parameters():
                if p.grad is not None and trainer.step < noise_steps:
                    p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
            return step(*arguments)

        trainer.optimizer.optimizer.step = noisy
        for _ in range(noise_steps + steps):
            trainer._train_step()
        return trainer.held_out_loss()

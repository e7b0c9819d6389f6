"""Do steps inside the backward pass, and factored states, train as well as ordinary steps and full states?

All weights of the pretrained diffusion model learn its new digits, or a LoRA does, and the same of a pretrained
transformer that learns to match texts; with 8-bit states and half of the run as warm-up. Printed: the held-out loss at
the end of each way, mean over seeds, and how it differs from that of ordinary steps with full states. Gradients are not
clipped: their global norm is not known inside the backward pass.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from library import automagic_cameamp as family

from .arguments import add_shared
from .study import protocol
from .study.task import Named, Task

# The rates of the optimizer under test for each task, and of AdamW8bit: its best of a grid in steps of 2.
RATES: dict[str, tuple[float, float]] = {
    "digits, all weights": (1e-4, 2.5e-4),
    "digits, LoRA": (5e-4, 2e-3),
    "encoder, all weights": (2.5e-6, 3e-5),
    "encoder, LoRA": (1.25e-4, 1e-3),
}
# Ways to train, with the options of the optimizer and whether it steps inside the backward pass.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "ordinary": ({}, False),
    "in backward": ({}, True),
    "factored": ({"factored": True}, False),
    "factored, in backward": ({"factored": True}, True),
}
_PEER = "AdamW8bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, seeds=5, steps=400, threads=1)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES), help="what is trained (default: all)")
    parser.add_argument("--contextual", action="store_true", help="train with the contextual optimizer")


def run(args: argparse.Namespace) -> None:
    """Train and print."""
    torch.set_num_threads(args.threads)
    name = "Automagic_CameAMP_COptim8bit" if args.contextual else "Automagic_CameAMP8bit"
    print(f"{name}, held-out loss after {args.steps} steps, mean of {args.seeds} seeds")
    for task in args.tasks:
        losses = {way: [final_loss(task, name, way, seed, args.steps) for seed in range(args.seeds)] for way in WAYS}
        losses[_PEER] = [final_loss(task, _PEER, "ordinary", seed, args.steps) for seed in range(args.seeds)]
        ordinary = statistics.mean(losses["ordinary"])
        for way, found in losses.items():
            mean = statistics.mean(found)
            print(f"{task:22}{way:24}{mean:9.5f}{mean / ordinary - 1:+8.2%}", flush=True)


def final_loss(task: str, name: str, way: str, seed: int, steps: int) -> float:
    """The held-out loss at the end of one run.

    Args:
        task: one of RATES.
        name: the optimizer.
        way: one of WAYS.
        seed: of weights and batches.
        steps: how many.
    """
    own_lr, peer_lr = RATES[task]
    made = protocol.TASKS[task](seed)
    named = made.named_parameters()
    options, in_backward = WAYS[way]
    if name == _PEER:
        import bitsandbytes

        optimizer: Any = bitsandbytes.optim.AdamW8bit([p for _, p in named], lr=peer_lr)
    else:
        options = {**options, "warmup_steps": steps // 2, "full_finetune": task.endswith("all weights")}
        lr = {} if "COptim" in name else {"lr": own_lr}
        optimizer = getattr(family, name)([p for _, p in named], **lr, **options)
        optimizer.set_parameter_names({p: label for label, p in named})
    if in_backward:
        step_in_hooks(optimizer)
    train(made, named, optimizer, steps)
    return made.held_out_loss()


def train(task: Task, named: Named, optimizer: Any, steps: int) -> None:
    """Take some steps; whatever has been stepped in hooks has no gradient any more."""
    for number in range(steps):
        loss = task.loss(number)
        family.report_loss(optimizer, loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def step_in_hooks(optimizer: Any) -> None:
    """Have each parameter stepped as soon as its gradient is there, and the gradient freed."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):

            def hook(p: torch.Tensor, group: Any = group, index: int = index) -> None:
                optimizer.step_parameter(p, group, index)
                p.grad = None

            parameter.register_post_accumulate_grad_hook(hook)

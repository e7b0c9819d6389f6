"""Do two LoRAs work together that were trained apart, and how much of each is a single direction?

Optimizers without a learning rate are said to grow LoRAs of one strong direction, which spoil each other when two are
used together. Two LoRAs are trained under a cosine, one on some of the digits that the diffusion model does not know,
the other on the rest. Printed for each optimizer: the held-out loss of each LoRA on its own digits, that of both
together on all of these digits, and the share that the largest singular value has of a change's squared norm, mean over
layers.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

import torch

from .arguments import add_shared
from .contenders import REFERENCE
from .study.digits import DigitsLoRA
from .study.optimizers import CONTEXTUAL, builder
from .study.schedules import cosine
from .study.task import train
from .table import Table

_HALVES = ((5, 6, 7), (8, 9))
_RANK, _BATCH = 16, 8

# The optimizers and their rates: AdamW's best one under a cosine, and what the others ask for.
_CONTENDERS = (
    (CONTEXTUAL, 1e-6),
    (REFERENCE, 4e-3),
    (REFERENCE, 1e-3),
    ("prodigyopt Prodigy", 1.0),
    ("adv_optm Prodigy_adv", 1.0),
)


class Found(NamedTuple):
    """What is printed of an optimizer."""

    alone: float
    together: float
    top_share: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, seeds=3, steps=400, threads=1)


def run(args: argparse.Namespace) -> None:
    """Train and print."""
    torch.set_num_threads(args.threads)
    print(f"held-out losses after {args.steps} steps, mean of {args.seeds} seeds")
    table = Table("{:<28}{:>8}{:>13.5f}{:>15.5f}{:>15.1%}", "", "rate", "each alone", "both together", "top direction")
    for name, lr in _CONTENDERS:
        try:
            found = [stacked(name, lr, seed, args.steps) for seed in range(args.seeds)]
        except ImportError as error:
            print(f"left out: {name} ({error})")
            continue
        table.row(name, f"{lr:g}", *(statistics.mean(values) for values in zip(*found)))


def stacked(name: str, lr: float, seed: int, steps: int) -> Found:
    """Train two LoRAs and use both.

    Args:
        name: of the optimizer.
        lr: its rate.
        seed: of the first LoRA and its batches; the second one has others.
        steps: how many.
    """
    options = {"warmup_steps": steps // 2} if name == CONTEXTUAL else {}
    alone, networks = [], []
    for number, digits in enumerate(_HALVES):
        task = DigitsLoRA(2 * seed + number, _RANK, _BATCH, digits=digits)
        alone += train(task, builder(name, lr, options), steps, steps, cosine)
        networks.append(task.lora)
    both = DigitsLoRA(seed, _RANK, _BATCH)
    both.lora.load_state_dict(networks[0].state_dict())
    both.add(networks[1])
    shares = [_top_share(module) for network in networks for module in network.children()]
    return Found(statistics.mean(alone), both.held_out_loss(), statistics.mean(shares))


def _top_share(module: torch.nn.Module) -> float:
    """What the largest singular value has of the squared norm of a layer's change."""
    down, up = (getattr(module, name).weight.detach().flatten(1) for name in ("lora_down", "lora_up"))
    squares = torch.linalg.svdvals(up @ down).square()
    return (squares[0] / squares.sum()).item()

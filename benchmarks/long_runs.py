"""Do weights in bfloat16 train as float32 weights do, at small rates and over thousands of steps?

All weights of the pretrained diffusion model learn its new digits, with the plain 8-bit optimizer. The model computes
in float32 in every run; what differs is how the weights are kept from step to step: in float32, in bfloat16 with
stochastic rounding, and in bfloat16 rounded to nearest, which no option offers. Printed: the held-out loss at the end,
and how it differs from that of float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from library.automagic_cameamp import Automagic_CameAMP8bit
from library.cameamp.step import passes

from .arguments import add_shared
from .study.digits import AllOfDigits

WAYS = ("float32", "bfloat16", "bfloat16, to nearest")
_BATCH, _IMAGES = 8, 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, seeds=1, steps=2000, threads=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5], help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Train and print."""
    torch.set_num_threads(args.threads)
    before = AllOfDigits(0, _BATCH, images=_IMAGES).held_out_loss()
    print(f"held-out loss before {before:.5f}; after {args.steps} steps, mean of {args.seeds} seeds:")
    for rate in args.rates:
        expected = 0.0
        for way in WAYS:
            loss = sum(final_loss(way, rate, seed, args.steps) for seed in range(args.seeds)) / args.seeds
            expected = expected or loss
            print(f"rate {rate:7g}  {way:22}{loss:9.5f}{loss / expected - 1:+8.2%}", flush=True)


def final_loss(way: str, rate: float, seed: int, steps: int) -> float:
    """The held-out loss at the end of one run.

    Args:
        way: one of WAYS.
        rate: the learning rate; the masks of single elements may double it.
        seed: of the batches.
        steps: how many.
    """
    task = AllOfDigits(seed, _BATCH, images=_IMAGES)
    computed = [p for _, p in task.named_parameters()]
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    kept = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in computed]
    options: dict[str, Any] = {"max_lr": 2 * rate, "lr_bump": rate / 100, "min_lr": rate / 10}
    to_nearest = way.endswith("nearest")
    if to_nearest:
        options["fused"] = False  # Kernels round by themselves.
    optimizer = Automagic_CameAMP8bit(kept, lr=rate, full_finetune=True, **options)
    with _rounding_to_nearest() if to_nearest else nullcontext():
        for number in range(steps):
            task.loss(number).backward()
            for p, own in zip(computed, kept):
                assert p.grad is not None
                own.grad, p.grad = p.grad.to(dtype), None
            optimizer.step()
            with torch.no_grad():
                for p, own in zip(computed, kept):
                    p.copy_(own)
    return task.held_out_loss()


@contextmanager
def _rounding_to_nearest() -> Iterator[None]:
    with patch.object(passes, "stochastic_round", _to_nearest):
        yield


def _to_nearest(x: Tensor, dtype: torch.dtype, dither: Any) -> Tensor:
    return x.to(dtype)

"""How many bytes of states does a parameter of a LoRA take, rank by rank?

Counted from the shapes of a model's LoRA and the table of states. Small ranks make small factors, which pay more for
the scales of their blocks, and of which the smallest are not coded.
"""

from __future__ import annotations

import argparse

import torch

from library import automagic_cameamp as family
from library.cameamp.config import OptimizerConfig
from library.cameamp.phase import Phase
from library.cameamp.states import bytes_of

from .contenders import FAMILY
from .models import NAMES, load
from .table import Table

_RANK_OF_SHAPES = 16
_LORAS = tuple(name for name in NAMES if f"lora{_RANK_OF_SHAPES}" in name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", choices=_LORAS, default="sd15_lora16", help="whose LoRA (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="the ranks (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Count and print."""
    table = Table("{:<30}{:>5}{:>10.2f}{:>10.2f}", args.model, "rank", "warm-up", "after")
    for name in FAMILY:
        for rank in args.ranks:
            table.row(name, rank, *(bytes_of_lora(name, args.model, rank, warmup) for warmup in (True, False)))


def bytes_of_lora(optimizer: str, model: str, rank: int, warmup: bool) -> float:
    """Bytes of states for each parameter of a LoRA.

    Args:
        optimizer: name of one of the family.
        model: name of the shapes of its LoRA of rank 16.
        rank: the rank in place of 16.
        warmup: whether in the warm-up; else after it.
    """
    config = OptimizerConfig()
    phase = Phase.at(1 if warmup else config.warmup_steps, config.warmup_steps)
    precision = getattr(family, optimizer)._precision
    periods = config.momentum_scales if "COptim" in optimizer else ()
    shapes = [torch.Size(rank if length == _RANK_OF_SHAPES else length for length in shape) for shape in load(model)]
    held = sum(bytes_of(shape, phase, config, precision, periods) for shape in shapes)
    return held / sum(shape.numel() for shape in shapes)

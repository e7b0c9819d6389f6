"""How much of an 8-bit step goes into unpacking and packing the states?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from library.automagic_cameamp import Automagic_CameAMP8bit
from library.cameamp.stacks.stack import Stack

from .arguments import add_shared
from .models import load, parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, model="sd15_lora16", rounds=15, threads=2)


def run(args: argparse.Namespace) -> None:
    """Measure and print, for the first phase and the last."""
    torch.set_num_threads(args.threads)
    for phase, warmup_steps in (("early", 1_000_000), ("after", 0)):
        optimizer = Automagic_CameAMP8bit(parameters(load(args.model)), warmup_steps=warmup_steps)
        for _ in range(2):
            optimizer.step()
        with _timed("read") as reading, _timed("write") as writing:
            start = time.perf_counter()
            for _ in range(args.rounds):
                optimizer.step()
            total = time.perf_counter() - start
        shares = [reading.seconds / total, writing.seconds / total]
        print(
            f"{phase:6} unpacking {shares[0]:.0%}, packing {shares[1]:.0%}, all else {1 - sum(shares):.0%} of the step"
        )


@dataclass
class _Time:
    seconds: float = 0.0


@contextmanager
def _timed(method: str) -> Iterator[_Time]:
    """Add up the time that is spent in a method of the stacks' states."""
    spent, original = _Time(), getattr(Stack, method)

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            spent.seconds += time.perf_counter() - start

    with mock.patch.object(Stack, method, timed):
        yield spent

"""Runs of the embedded trainer, for benchmarks that look at its optimizer while it trains."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState

from library.cameamp_demo.options import parse
from library.cameamp_demo.trainer import Trainer


@contextmanager
def embedded_trainer(rank: int, warmup_steps: int, *arguments: str) -> Iterator[Trainer]:
    """The trainer of an embedded LoRA before its first step. Its files are deleted at the end.

    Args:
        rank: of the LoRA; its alpha is the same.
        warmup_steps: of the optimizer.
        arguments: more of the embedded trainer's command line.
    """
    # Accelerate keeps the settings of the process's first run, and would hold a second run to them.
    AcceleratorState._reset_state(reset_partial_state=True)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        yield Trainer(parse([
            "--output_dir", folder, "--network_dim", str(rank), "--network_alpha", str(rank),
            "--optimizer_args", f"warmup_steps={warmup_steps}", *arguments,
        ]))  # fmt: skip

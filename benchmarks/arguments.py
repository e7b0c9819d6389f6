"""The options that several benchmarks take, each defined once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .models import NAMES

_SHARED: dict[str, dict[str, Any]] = {
    "rounds": {"type": int, "help": "measured steps of each optimizer"},
    "threads": {"type": int, "help": "CPU threads"},
    "model": {"choices": NAMES, "help": "the model whose tensor shapes are used"},
    "seeds": {"type": int, "help": "number of seeds"},
    "steps": {"type": int, "help": "steps of a training run, half of them warm-up"},
    "results": {"type": Path, "help": "file of finished runs, which are not trained again"},
}


def add_shared(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the named options, each with its default."""
    for name, default in defaults.items():
        option = _SHARED[name]
        text = f"{option['help']} (default: %(default)s)"
        parser.add_argument(f"--{name}", default=default, **{**option, "help": text})

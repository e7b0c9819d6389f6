"""The learning rates that the training scripts of sd-scripts take, each held against the optimizer's bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from ..command_line import UserError
from ..config import OptimizerConfig

# What LoRA+ and the block weights of a network multiply these by are factors, and no rates.
RATES = (
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    "learning_rate_te3",
    "block_lr",
    "control_net_lr",
    "llm_adapter_lr",
    "self_attn_lr",
    "cross_attn_lr",
    "mlp_lr",
    "mod_lr",
)


def starting_rate(args: argparse.Namespace, lowest: float) -> Any:
    """What stands for `--learning_rate` where the optimizer itself needs one above 0.

    A rate of 0 means that what has no rate of its own stays as it is; then something else must have one.

    Args:
        args: sd-scripts' options.
        lowest: the optimizer's `min_lr`.
    """
    rate = args.learning_rate
    if _is_number(rate) and rate == 0 and any(_is_number(value) and value > 0 for _, value in _given(args)):
        return lowest
    return rate


def check_rates(args: argparse.Namespace, config: OptimizerConfig) -> None:
    """Refuse a rate that is neither 0 nor within the bounds: a factor for another optimizer, such as 1, ruins a run.

    Raises:
        UserError: with the option, its value and the bounds.
    """
    for name, value in _given(args):
        # The configuration has checked a learning_rate other than 0.
        if name != "learning_rate" and not (
            _is_number(value) and (value == 0 or config.min_lr <= value <= config.max_lr)
        ):
            raise UserError(
                f"{name} is {value!r}; allowed: 0 or a number from min_lr ({config.min_lr:g}) to max_lr "
                f"({config.max_lr:g})"
            )


def given_rates(args: argparse.Namespace) -> str:
    """The rates that are set, in words."""
    return ", ".join(f"{name} is {value}" for name, value in _given(args))


def _given(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The rates that are set, one by one."""
    for name in RATES:
        value = getattr(args, name, None)
        if name == "block_lr" and isinstance(value, str):
            value = [_as_number(word) for word in value.split(",")] if value else []
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None:
                yield name, item


def _as_number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

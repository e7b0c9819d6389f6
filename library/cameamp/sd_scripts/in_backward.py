"""`--fused_backward_pass`: sd-scripts steps each parameter in a hook of the backward pass, for Adafactor alone.

Its scripts have `library.adafactor_fused` give the prepared optimizer a method `step_param`, which the hooks call.
Ours have one.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from ..command_line import UserError
from ..optimizer import CameAMP

logger = logging.getLogger(__name__)


class InBackward:
    """Serves `--fused_backward_pass` in a run.

    Args:
        optimizers: those of the run.
    """

    def __init__(self, optimizers: Sequence[CameAMP]) -> None:
        self._optimizers = optimizers
        self._args = argparse.Namespace()
        self._served = False

    def install(self) -> None:
        """Wrap what the scripts call to prepare an optimizer for the hooks, if this sd-scripts has it."""
        try:
            module: Any = importlib.import_module("library.adafactor_fused")
        except ImportError:  # sd-scripts before version 0.9, which has no such option
            return
        original: Callable[[Any], None] = module.patch_adafactor_fused

        @wraps(original)
        def patch_adafactor_fused(optimizer: Any) -> None:
            own = getattr(optimizer, "optimizer", optimizer)  # It may be in accelerate's wrapper.
            if not any(own is other for other in self._optimizers):
                original(optimizer)
                return
            optimizer.step_param = own.step_parameter
            self._served = True

        module.patch_adafactor_fused = patch_adafactor_fused

    def begin(self, args: argparse.Namespace, accelerator: Any) -> None:
        """Begin a run.

        Raises:
            UserError: several processes, whose gradients are averaged only after the hooks have run.
        """
        self._args, self._served = args, False
        if _is_asked_for(args) and accelerator.num_processes > 1:
            raise UserError(
                f"--fused_backward_pass steps before the {accelerator.num_processes} processes have averaged their "
                "gradients; train with one process, or without it"
            )

    def step_ends(self) -> None:
        """After a backward pass in which the optimizers stepped."""
        if self._served:
            for optimizer in self._optimizers:
                optimizer.step()
        elif _is_asked_for(self._args) and self._optimizers:
            self._args = argparse.Namespace()
            logger.warning("--fused_backward_pass: this script does not step in the backward pass, and ignores it")


def refuse_what_does_not_fit(args: argparse.Namespace) -> None:
    """Raise UserError if `--fused_backward_pass` is given beside an option with which it cannot be had."""
    if not _is_asked_for(args):
        return
    batches = getattr(args, "gradient_accumulation_steps", 1) or 1
    if batches > 1:
        raise UserError(
            f"--fused_backward_pass frees each gradient at once, and --gradient_accumulation_steps {batches} adds "
            "gradients up; give one of the two"
        )
    if getattr(args, "mixed_precision", None) == "fp16" or getattr(args, "full_fp16", False):
        raise UserError(
            "--fused_backward_pass steps with gradients that fp16's loss scaling has multiplied; train in bf16"
        )


def without_it(args: argparse.Namespace) -> argparse.Namespace:
    """The options for what refuses every optimizer but Adafactor."""
    return argparse.Namespace(**{**vars(args), "fused_backward_pass": False}) if _is_asked_for(args) else args


def _is_asked_for(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "fused_backward_pass", False))

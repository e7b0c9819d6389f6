"""A schedule that goes on past its planned end."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from ..optimizer import CameAMP

logger = logging.getLogger(__name__)


class PlannedEnd:
    """Warns once if the learning rate grows again after the end for which the schedule was planned.

    A cosine is 0 there, and then rises. It comes to that if a run is resumed and makes more steps, together with
    those before, than `--max_train_steps` says.

    Args:
        optimizers: those of the run.
        args: sd-scripts' options; the number of steps may still change before the first step.
        accelerator: accelerate's.
    """

    def __init__(self, optimizers: Sequence[CameAMP], args: argparse.Namespace, accelerator: Any) -> None:
        self._optimizers = optimizers
        self._args = args
        self._accelerator = accelerator
        self._rate: float | None = None
        self._has_warned = False

    def step_begins(self) -> None:
        """Look at the rate of the step that is about to be taken; nothing is read from the device."""
        schedulers = self._accelerator._schedulers
        if self._has_warned or not schedulers or not self._optimizers:
            return
        # accelerate takes a step of the schedule for each process.
        planned = self._args.max_train_steps * self._accelerator.num_processes
        done = getattr(getattr(schedulers[0], "scheduler", schedulers[0]), "last_epoch", 0)
        before, self._rate = self._rate, max(float(entry["lr"]) for entry in self._optimizers[0].param_groups)
        if done > planned and before is not None and self._rate > before:
            self._has_warned = True
            logger.warning(
                "the schedule %s was planned for the %d steps of --max_train_steps and is past them: the learning rate "
                "grows again, from %g to %g; resume with --skip_until_initial_step, with which the steps already made "
                "count, or use --lr_scheduler constant",
                getattr(self._args, "lr_scheduler_type", "") or self._args.lr_scheduler,
                self._args.max_train_steps,
                before,
                self._rate,
            )

"""Resuming: what sd-scripts prepares only after it has loaded a state, and a learning rate that has changed."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ..command_line import UserError
from ..new_rate import rescale
from ..optimizer import CameAMP

logger = logging.getLogger(__name__)


class Resume:
    """Completes what sd-scripts resumes.

    sd-scripts loads a state when it has prepared the first of several optimizers. Those that it prepares later, and
    their schedulers, it would leave as they were built, without a word.

    Args:
        optimizers: those of the run, in the order in which they were built.
        new_rate: whether the run goes on at the learning rates that were asked for, not at the state's.
    """

    def __init__(self, optimizers: Sequence[CameAMP], new_rate: bool = False) -> None:
        self._optimizers = optimizers
        self._new_rate = new_rate
        self._begin(None)

    def _begin(self, folder: Path | None) -> None:
        self._folder = folder
        self._loaded_optimizers = self._loaded_schedulers = 0
        self._has_warned = False
        # The rates of each optimizer's groups as it was built.
        self._asked = [rates_of(optimizer) for optimizer in self._optimizers]

    def loading(self, accelerator: Any, load_state: Callable[..., Any]) -> Callable[..., Any]:
        """`load_state` that checks the folder, and remembers what of it has been loaded."""

        @wraps(load_state)
        def load_and_remember(input_dir: Any = None, **options: Any) -> Any:
            if input_dir is None or not self._optimizers:
                return load_state(input_dir, **options)
            folder = Path(input_dir).expanduser()
            self._check_files(folder)
            self._begin(folder)
            try:
                result = load_state(input_dir, **options)
            except ValueError as error:
                raise UserError(f"--resume {folder}: {error}") from error
            self._loaded_optimizers = len(accelerator._optimizers)
            self._loaded_schedulers = len(accelerator._schedulers)
            for prepared in accelerator._optimizers:
                self._mind_the_rate(prepared)
            for prepared in accelerator._schedulers:
                self._give_new_rates(prepared)
            return result

        return load_and_remember

    def load_what_is_new(self, accelerator: Any) -> None:
        """Load the optimizers and schedulers that have been prepared since the state was loaded.

        Raises:
            UserError: a file cannot be read, or is of something else; with its name.
        """
        if self._folder is None:
            return
        for number in range(self._loaded_optimizers, len(accelerator._optimizers)):
            prepared = accelerator._optimizers[number]
            _load(self._folder / _file("optimizer", number), prepared)
            self._mind_the_rate(prepared)
        for number in range(self._loaded_schedulers, len(accelerator._schedulers)):
            prepared = accelerator._schedulers[number]
            _load(self._folder / _file("scheduler", number), prepared)
            self._give_new_rates(prepared)
        self._loaded_optimizers = len(accelerator._optimizers)
        self._loaded_schedulers = len(accelerator._schedulers)

    def _check_files(self, folder: Path) -> None:
        """Refuse a folder of more or fewer optimizers before anything is loaded."""
        if not folder.is_dir():
            raise UserError(f"--resume {folder}: is not a folder")
        wanted = [_file("optimizer", number) for number in range(len(self._optimizers))]
        there = [path.name for path in folder.iterdir() if re.fullmatch(r"optimizer(_\d+)?\.bin", path.name)]
        if "optimizer.bin" not in there:
            raise UserError(f"--resume {folder}: has no optimizer.bin, so it is no state that --save_state has saved")
        wrong = sorted(set(wanted) ^ set(there))
        if wrong:
            lacks = "has no" if wrong[0] in wanted else "has also"
            raise UserError(
                f"--resume {folder}: {lacks} {wrong[0]}; the state is of another number of optimizers than the "
                f"{len(wanted)} of this run: use the same --fused_optimizer_groups or --blockwise_fused_optimizers as "
                "before"
            )

    def _mind_the_rate(self, prepared: Any) -> None:
        """Give a loaded optimizer the rates that were asked for, or warn once that they do not count."""
        optimizer = getattr(prepared, "optimizer", prepared)
        number = next((number for number, own in enumerate(self._optimizers) if own is optimizer), None)
        if number is None:
            return
        asked, resumed = self._asked[number], rates_of(optimizer)
        if all(math.isclose(new, old, rel_tol=1e-6) for new, old in zip(asked, resumed)):
            return
        if self._new_rate:
            try:
                rescale(optimizer, asked)
            except ValueError as error:
                raise UserError(f"--new_learning_rate_on_resume: {error}") from error
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "--resume: the run goes on at the state's learning rate, %s, and not at %s; "
                "to change it add --new_learning_rate_on_resume",
                _listed(resumed),
                _listed(asked),
            )

    def _give_new_rates(self, prepared: Any) -> None:
        if self._new_rate:
            _follow_the_optimizer(getattr(prepared, "scheduler", prepared))


def rates_of(optimizer: CameAMP) -> list[float]:
    """The learning rate of each group that a scheduler multiplies."""
    return [group.initial_lr for group in optimizer._current_groups()]


def _follow_the_optimizer(scheduler: Any) -> None:
    """Give a scheduler, and those that it is made of, its optimizer's rates in place of those it was saved with."""
    for part in getattr(scheduler, "_schedulers", ()):
        _follow_the_optimizer(part)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [entry["initial_lr"] for entry in scheduler.optimizer.param_groups]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [entry["lr"] for entry in scheduler.optimizer.param_groups]


def _load(file: Path, prepared: Any) -> None:
    try:
        prepared.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # A damaged file can make the readers raise anything.
        raise UserError(f"--resume {file}: {str(error).partition(chr(10))[0]}") from error


def _file(kind: str, number: int) -> str:
    """How accelerate calls it."""
    return f"{kind}_{number}.bin" if number else f"{kind}.bin"


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))

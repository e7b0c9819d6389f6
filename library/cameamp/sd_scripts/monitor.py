"""The values that trackers and progress bar show: read from the device at most once per step that is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from ..optimizer import CameAMP
from ..readings import named, read

# A tracker reads the values at each step that it logs. Without one the progress bar reads them every so many steps.
_BAR_EVERY = 10


class Monitor:
    """The values of a run's optimizers, read when they are first shown, and reused until the next optimizer step.

    Args:
        optimizers: those of the run; several if each steps during the backward pass.
    """

    def __init__(self, optimizers: Sequence[CameAMP]) -> None:
        self._optimizers = optimizers
        self._steps = 0
        self._read_at = -1
        self._values: dict[str, float] = {}

    def step_ends(self) -> None:
        """Note that the optimizers are about to step, after which values read before are outdated."""
        self._steps += 1

    def values(self) -> dict[str, float]:
        """Values by the names under which trackers group them."""
        if self._read_at != self._steps:
            self._read_at = self._steps
            self._values = named(read(self._optimizers))
        return self._values

    def mean_learning_rate(self) -> float | None:
        """Mean effective learning rate, at most ten optimizer steps old; None without optimizers."""
        if not self._optimizers:
            return None
        values = self._values if self._values and self._steps < self._read_at + _BAR_EVERY else self.values()
        means = [value for name, value in values.items() if name.endswith("/mean")]
        return sum(means) / len(means)

    def add_to_tracker(self, tracker: Any) -> None:
        """Make a tracker of accelerate log these values whenever it logs learning rates."""
        tracker.log = self._with_values(tracker.log)

    def add_to_progress_bars(self, bar_class: Any) -> None:
        """Make sd-scripts' progress bar, which shows the average loss, show the mean effective learning rate too."""
        original = bar_class.set_postfix

        @wraps(original)
        def set_postfix(bar: Any, *values: Any, **more: Any) -> Any:
            if "avr_loss" in more and not bar.disable:
                rate = self.mean_learning_rate()
                if rate is not None:
                    more["lr"] = f"{rate:.2e}"
            return original(bar, *values, **more)

        bar_class.set_postfix = set_postfix

    def _with_values(self, log: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(log)
        def log_with_values(values: Mapping[str, Any], *more: Any, **options: Any) -> Any:
            if self._optimizers and any(name == "lr" or name.startswith("lr/") for name in values):
                values = {**values, **self.values()}
            return log(values, *more, **options)

        return log_with_values

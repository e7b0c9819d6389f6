"""The values that trackers and progress bar show: read from the device at most once per step that is shown."""

from __future__ import annotations

import math
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
        self.restart()

    def restart(self) -> None:
        """Begin another run."""
        self._steps = 0
        self._read_at = -1
        self._values: dict[str, float] = {}
        self._has_tracker = False
        # The host's names of the groups, once it has logged them.
        self._groups: list[str] | None = None

    def step_ends(self) -> None:
        """Note that the optimizers are about to step, after which values read before are outdated."""
        self._steps += 1

    def values(self) -> dict[str, float]:
        """Values by the names under which trackers group them."""
        if self._read_at != self._steps:
            self._read_at = self._steps
            self._values = named(read(self._optimizers))
        return self._values

    def learning_rates(self) -> dict[str, float]:
        """Mean effective learning rate of each group that the host has named, or of all; nothing without optimizers.

        Without a tracker they are at most ten optimizer steps old.
        """
        if not self._optimizers:
            return {}
        is_recent = self._values and self._steps < self._read_at + _BAR_EVERY and not self._has_tracker
        values = self._named(self._values if is_recent else self.values())
        means = {name.split("/")[1]: value for name, value in values.items() if name.endswith("/mean")}
        if self._groups is not None and len(means) > 1:
            return {f"lr/{group}": value for group, value in means.items()}
        return {"lr": sum(means.values()) / len(means)}

    def add_to_tracker(self, tracker: Any) -> None:
        """Make a tracker of accelerate log these values whenever it logs learning rates."""
        self._has_tracker = True
        tracker.log = self._with_values(tracker.log)

    def add_to_progress_bars(self, bar_class: Any) -> None:
        """Make sd-scripts' progress bar, which shows the average loss, show the mean effective learning rates too."""
        original = bar_class.set_postfix

        @wraps(original)
        def set_postfix(bar: Any, *values: Any, **more: Any) -> Any:
            if "avr_loss" in more and not bar.disable:
                more |= {name: f"{rate:.2e}" for name, rate in self.learning_rates().items()}
            return original(bar, *values, **more)

        bar_class.set_postfix = set_postfix

    def _with_values(self, log: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(log)
        def log_with_values(values: Mapping[str, Any], *more: Any, **options: Any) -> Any:
            if self._optimizers and any(name == "lr" or name.startswith("lr/") for name in values):
                self._groups = self._groups or _host_names(values, self._optimizers)
                values = {**values, **self._named(self.values())}
            return log(values, *more, **options)

        return log_with_values

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values, with the host's names of the groups if they are known."""
        new = {f"group{number}": name for number, name in enumerate(self._groups or ())}
        renamed = {}
        for name, value in values.items():
            section, *rest = name.split("/")
            if section == "effective_lr":
                rest[0] = new.get(rest[0], rest[0])
            renamed["/".join([section, *rest])] = value
        return renamed


def _host_names(values: Mapping[str, Any], optimizers: Sequence[CameAMP]) -> list[str] | None:
    """What sd-scripts calls the groups: its first values `lr/NAME`, in the order of the groups.

    Returns:
        The names; None if it names fewer groups than there are, or others: after the groups, network trainers log the
        first group once more as `lr/textencoder`.
    """
    entries = [entry for optimizer in optimizers for entry in optimizer.param_groups]
    logged = [(name[3:], value) for name, value in values.items() if name.startswith("lr/") and "d*lr" not in name]
    logged = logged[: len(entries)]
    names = [name for name, _ in logged]
    if len(optimizers) > 1 or len(names) < len(entries) or "textencoder" in names[1:]:
        return None
    fits = all(
        "/" not in name and math.isclose(float(value), float(entry["lr"]), rel_tol=1e-6, abs_tol=1e-30)
        for (name, value), entry in zip(logged, entries)
    )
    return names if fits else None

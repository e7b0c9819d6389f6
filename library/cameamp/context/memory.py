"""What a context remembers from step to step, as tensors where the parameters are, and how a checkpoint holds it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..devices import moved

HISTORIES = ("loss_history", "gradient_history", "lr_history")
SAMPLES = ("last_gradient", "course")
# What kernels find after a step, in their order.
FOLLOWED = ("multiplier", "alignment", "length", "alignment_square")
_SCALARS = ("confidence", "alignment", "length", "alignment_square")
# Numbers, because the learning rates of the groups are: no device has to be asked for them.
_NUMBERS = ("top", "steps")
# What contexts did not have at first.
_ADDED = {"alignment_square"}
# What contexts had whose multiplier followed another law.
_OF_AN_OLDER_LAW = ("last_change", "alignment_sum", "alignment_variance")


class Memory:
    """The tensors of one context. Nothing is read back from the device before somebody asks for a number.

    Args:
        window: how many steps the histories go back.

    Attributes:
        window: how many steps the histories go back.
        values: 0-d tensors and histories, (window,) float32, newest last, by name; `multiplier` is not a number until
            the first step.
        samples: those of the last gradient and of the course, 1-d bfloat16, by name; None before them.
        top: the largest factor that a schedule has had.
        schedule: the factor at this step, in units of that one.
        steps: how many steps the multiplier has followed.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self.device = torch.device("cpu")
        with self.device:  # whatever the default is
            self.values = {
                "multiplier": torch.tensor(torch.nan, dtype=torch.float32),
                **{name: torch.zeros((), dtype=torch.float32) for name in _SCALARS},
                "edge_cases": torch.zeros((), dtype=torch.int64),
                **{name: torch.full((self.window,), torch.nan, dtype=torch.float32) for name in HISTORIES},
            }
        self.samples: dict[str, Tensor | None] = dict.fromkeys(SAMPLES)
        self.top, self.schedule, self.steps = 0.0, 1.0, 0

    def go_to(self, device: torch.device) -> None:
        """Have all tensors on a device."""
        if self.device != device:
            self.device = device
            self.values = {name: moved(value, device) for name, value in self.values.items()}
            self.samples = {
                name: None if sample is None else moved(sample, device) for name, sample in self.samples.items()
            }

    def kept(self) -> Memory:
        """The same memory, which is not changed together with this one as long as no tensor is."""
        same = copy.copy(self)
        same.values, same.samples = dict(self.values), dict(self.samples)
        return same

    def see_schedule(self, factor: float) -> None:
        """Take notice of a schedule's factor at this step."""
        self.top = max(self.top, factor)
        self.schedule = factor / self.top if self.top > 0 else 1.0

    def remember(self, name: str, value: Tensor) -> None:
        """Add the newest value, 0-d, to a history."""
        self.values[name] = torch.cat([self.values[name][1:], value.view(1)])

    def history(self, name: str) -> list[float]:
        """A history, newest last; steps of which nothing was seen are left out."""
        return [value for value in self.values[name].tolist() if not math.isnan(value)]

    def sample_like(self, name: str, other: Tensor) -> Tensor:
        """The last sample called `name`, in float32; zeros if there is none, or it has another shape than `other`."""
        sample = self.samples[name]
        return torch.zeros_like(other) if sample is None or sample.shape != other.shape else sample.float()

    def saved(self, start: float) -> dict[str, Any]:
        """Everything that resuming needs: tensors and numbers.

        Args:
            start: the multiplier's first value, in case no step was taken yet.
        """
        multiplier = self.values["multiplier"].item()
        context = {name: self.values[name].clone() for name in (*HISTORIES, *_SCALARS)}
        context.update((name, torch.tensor(float(getattr(self, name)), dtype=torch.float32)) for name in _NUMBERS)
        context.update((name, sample.clone()) for name, sample in self.samples.items() if sample is not None)
        return {
            "c_optim_context": context,
            "edge_case_count": int(self.values["edge_cases"].item()),
            "contextual_lr_multiplier": start if math.isnan(multiplier) else multiplier,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what `check` found to be right."""
        self.reset()
        context = saved["c_optim_context"]
        for name in _SCALARS:
            self.values[name] = context[name].clone() if name in context else context["alignment"].square()
        for name in HISTORIES:
            newest = context[name][-self.window :]
            self.values[name][self.window - len(newest) :] = newest
        self.top, self.steps = context["top"].item(), int(context["steps"].item())
        begun = any(name in context for name in SAMPLES)
        multiplier = float(saved["contextual_lr_multiplier"]) if begun else torch.nan
        self.values["multiplier"] = torch.tensor(multiplier, dtype=torch.float32)
        self.values["edge_cases"] = torch.tensor(saved["edge_case_count"], dtype=torch.int64)
        self.values = {name: value.to(self.device) for name, value in self.values.items()}
        for name in SAMPLES:
            self.samples[name] = context[name].to(self.device, copy=True) if name in context else None


# What a checkpoint holds of a context, in its first parameter group.
SAVED = ("c_optim_context", "edge_case_count", "contextual_lr_multiplier")


def is_in(saved: Mapping[str, Any]) -> bool:
    """Whether a saved parameter group carries a context, or a part of one."""
    return any(key in saved for key in SAVED)


def is_of_an_older_law(saved: Mapping[str, Any]) -> bool:
    """Whether a saved parameter group carries a context of which nothing is of use any more."""
    context = saved.get("c_optim_context")
    return isinstance(context, Mapping) and any(name in context for name in _OF_AN_OLDER_LAW)


def check(saved: Mapping[str, Any]) -> None:
    """Check a saved context.

    Raises:
        ValueError: what is wrong, with the key.
    """
    context = saved.get("c_optim_context")
    if not isinstance(context, Mapping):
        raise ValueError(f"c_optim_context is {type(context).__name__}, not a dictionary")
    for name in (*HISTORIES, *_SCALARS, *_NUMBERS):
        if name in _ADDED - context.keys():
            continue
        value = context.get(name)
        dimensions = 1 if name in HISTORIES else 0
        if not isinstance(value, Tensor) or value.ndim != dimensions or value.dtype != torch.float32:
            raise ValueError(f"c_optim_context has no float32 tensor '{name}' of {dimensions} dimensions")
    for name in SAMPLES:
        if name in context and not (isinstance(context[name], Tensor) and context[name].ndim == 1):
            raise ValueError(f"c_optim_context's '{name}' is not a tensor of one dimension")
    unknown = context.keys() - {*HISTORIES, *SAMPLES, *_SCALARS, *_NUMBERS}
    if unknown:
        raise ValueError(f"c_optim_context has the unknown key '{min(unknown)}'")
    count, multiplier = saved.get("edge_case_count"), saved.get("contextual_lr_multiplier")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"edge_case_count is {count!r}, not a whole number of at least 0")
    if not isinstance(multiplier, float) or not math.isfinite(multiplier) or multiplier <= 0:
        raise ValueError(f"contextual_lr_multiplier is {multiplier!r}, not a number above 0")

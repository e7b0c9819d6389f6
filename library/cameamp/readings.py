"""Reading what a run wants to see of its optimizers, in one transfer from the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .context.driver import Driver
from .groups import Group, States
from .step.rules import lr_factor


class Readings(NamedTuple):
    """What one optimizer is doing.

    Attributes:
        learning_rates: for each group, the mean, smallest and largest effective learning rate of its elements.
        context: what drives a contextual optimizer, by name; empty for the others.
    """

    learning_rates: list[tuple[float, float, float]]
    context: dict[str, float]


class Readable(Protocol):
    """An optimizer whose readings are still on the device."""

    def group_summaries(self) -> list[Tensor | float]:
        """For each group a tensor (mean, smallest, largest), or one number for all three where it is known."""

    def context_summary(self) -> Mapping[str, Tensor]:
        """0-d tensors by name."""


@torch.no_grad()
def summarize(group: Group, states: States, driver: Driver) -> Tensor | float:
    """Mean, smallest and largest effective learning rate of a group.

    Returns:
        (3,) float32 on the group's device; the one number that it starts from if there are no states here.
    """
    # Of shards what is here, which may be nothing.
    stacks = [stack for stack in group.stacks_with_states(states) if stack.rows > 0]
    if not stacks:
        return float(group.entry["lr"])
    sums, lows, highs, count = [], [], [], 0
    for stack in stacks:
        mask, rows = group.mask_and_row_scaling(stack, states)
        scaling = lr_factor(group.scheduler_factor, rows)
        mask = driver.scaled(mask)
        rates = mask * (1.0 if scaling is None else scaling)
        low, high = torch.aminmax(rates)
        sums.append(rates.sum())
        lows.append(low)
        highs.append(high)
        count += rates.numel()
    device = sums[0].device
    total, low, high = (torch.stack([x.to(device) for x in values]) for values in (sums, lows, highs))
    return torch.stack([total.sum() / count, low.amin(), high.amax()])


def read(optimizers: Sequence[Readable]) -> list[Readings]:
    """The readings of some optimizers; at most one read-back from the device in all."""
    summaries = [optimizer.group_summaries() for optimizer in optimizers]
    contexts = [optimizer.context_summary() for optimizer in optimizers]
    on_device = [s.flatten() for groups in summaries for s in groups if isinstance(s, Tensor)]
    on_device += [value.flatten() for context in contexts for value in context.values()]
    numbers = iter(
        torch.cat([t.to(on_device[0].device, torch.float32) for t in on_device]).tolist() if on_device else []
    )
    rates: list[list[tuple[float, float, float]]] = [
        [(next(numbers), next(numbers), next(numbers)) if isinstance(s, Tensor) else (s, s, s) for s in groups]
        for groups in summaries
    ]
    return [Readings(own, {name: next(numbers) for name in context}) for own, context in zip(rates, contexts)]


def named(readings: Sequence[Readings]) -> dict[str, float]:
    """The readings of a run's optimizers under the names that its logs show; groups are numbered through."""
    values: dict[str, float] = {}
    rates = [rate for reading in readings for rate in reading.learning_rates]
    for number, (mean, smallest, largest) in enumerate(rates):
        group = f"effective_lr/group{number}"
        values |= {f"{group}/mean": mean, f"{group}/smallest": smallest, f"{group}/largest": largest}
    for number, reading in enumerate(readings):
        section = "context" if len(readings) == 1 else f"context{number}"
        values |= {f"{section}/{name}": value for name, value in reading.context.items()}
    return values


class HasReadings:
    """What there is to read of an optimizer.

    Attributes:
        state: the states of its parameters.
        param_groups: its groups, as dictionaries.
    """

    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]
    _driver: Driver
    _unusable: dict[torch.device, Tensor]

    def _current_groups(self) -> list[Group]:
        raise NotImplementedError

    def _groups_with_states(self) -> list[Group]:
        raise NotImplementedError

    def nonfinite_elements(self) -> int:
        """How many gradient elements were not finite, or above 1e18, and so counted as 0, in this process."""
        return sum(int(count.item()) for count in self._unusable.values())

    def get_lr_mask(self, p: Tensor) -> Tensor:
        """The learning-rate mask of a parameter.

        Returns:
            float32 of p's shape, a copy; before p's first step, what its first step will start from.

        Raises:
            ValueError: `p` is not a parameter of this optimizer.
        """
        for group in self._current_groups():
            if any(p is other for other in group.params):
                return group.lr_mask(p, self.state)
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is not one of this optimizer's")

    def effective_learning_rates(self) -> list[tuple[float, float, float]]:
        """Mean, smallest and largest effective learning rate of each group; one read-back from the device in all.

        The effective learning rate of an element is its mask times the scheduler's factor, and for LoRA factors times
        ALLoRA's row scaling; in the contextual optimizers the mask counts times the multiplier. Before the first step
        of a group it is the group's learning rate.
        """
        return read([self])[0].learning_rates

    def group_summaries(self) -> list[Tensor | float]:
        """What `effective_learning_rates` reads, for each group, while still on the device."""
        return [summarize(group, self.state, self._driver) for group in self._groups_with_states()]

    def context_summary(self) -> dict[str, Tensor]:
        """The values that drive a contextual optimizer, still on the device; empty for the other optimizers."""
        return self._driver.summary()

    def _get_group_lr(self, group: Mapping[str, Any]) -> float:
        """Mean effective learning rate of one of this optimizer's groups.

        Raises:
            ValueError: `group` is not an entry of `param_groups`.
        """
        for own, rate in zip(self.param_groups, self.get_learning_rates()):
            if own is group:
                return rate
        raise ValueError("the group is not an entry of this optimizer's param_groups")

    def get_learning_rates(self) -> list[float]:
        """Mean effective learning rate of each group."""
        return [mean for mean, _, _ in self.effective_learning_rates()]

    def get_avg_learning_rate(self) -> float:
        """Mean over the groups of their mean effective learning rates."""
        rates = self.get_learning_rates()
        return sum(rates) / len(rates)

"""A parameter group: its options, what a scheduler makes of its learning rate, and its gradients as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import Batch
from .config import OPTION_NAMES, OptimizerConfig, check_group_names, checked
from .gradients import Magnitudes
from .techniques import agr, weight_decay

logger = logging.getLogger(__name__)

_SHARED = ("context_window", "edge_threshold", "adaptation_rate")


@dataclass(frozen=True)
class GroupOptions:
    """What a group was built with; schedulers may write into the group's dictionary, but not in here.

    Attributes:
        config: the group's options; its max_lr is raised to `lr` where that is higher.
        lr: the group's learning rate; unlike config.lr it may be 0, which freezes the group.
    """

    config: OptimizerConfig
    lr: float

    @classmethod
    def of(cls, param_group: Mapping[str, Any], number: int, defaults: OptimizerConfig) -> GroupOptions:
        """The options that a group sets, and the defaults of the others.

        Args:
            param_group: the group as the user gave it.
            number: its number, for messages.
            defaults: the constructor's options.

        Raises:
            TypeError, ValueError: as of `OptimizerConfig`, with the group's number.
        """
        try:
            if not isinstance(param_group, dict):
                raise TypeError(f"it is a {type(param_group).__name__}; allowed: a dictionary with 'params'")
            check_group_names(param_group)
            given = {name: param_group[name] for name in OPTION_NAMES if name in param_group}
            if "lr" not in given:
                config = defaults.replace(**given)
                return cls(config, config.lr)
            lr, lowest = checked("lr", given.pop("lr")), checked("min_lr", given.get("min_lr", defaults.min_lr))
            config = defaults.replace(**given, lr=lowest)
            if lr == 0:
                return cls(config, 0.0)
            if lr > config.max_lr:
                # Mostly a rate left over from another optimizer, which would ruin the run.
                logger.warning(
                    "parameter group %d: max_lr is raised from %g to the group's lr, %g", number, config.max_lr, lr
                )
                config = config.replace(max_lr=lr)
            return cls(config.replace(lr=lr), lr)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter group {number}: {error}") from None

    def check_shared(self, number: int, defaults: OptimizerConfig) -> None:
        """Raise ValueError where a group of a contextual optimizer wants a context of its own."""
        for name in _SHARED:
            value, shared = getattr(self.config, name), getattr(defaults, name)
            if value != shared:
                raise ValueError(
                    f"parameter group {number}: option '{name}' is {value!r}; there is one context for the whole "
                    f"optimizer, so a group cannot have its own; allowed: {shared!r}, as the constructor has it"
                )

    def initial_lr(self, group: Mapping[str, Any]) -> float:
        """The learning rate that a scheduler multiplies; `group` is the optimizer's entry of `param_groups`."""
        return float(group.get("initial_lr", self.lr))

    def starting_lr(self, group: Mapping[str, Any]) -> float:
        """Where the mask of the group's elements starts."""
        return min(max(self.initial_lr(group), self.config.min_lr), self.config.max_lr)

    def scheduler_factor(self, group: Mapping[str, Any]) -> float:
        """By how much a scheduler has changed the group's learning rate since the start."""
        lr, initial = group["lr"], self.initial_lr(group)
        if lr == 0:
            return 0.0
        # A group built with lr 0 and given one later is thawed; there is no ratio to take, and its mask leads.
        return lr / initial if initial != 0 else 1.0


@dataclass(frozen=True)
class GroupSums:
    """What the rules need to know of a group's gradients as a whole.

    Attributes:
        magnitude: 0-d, AGR's sum of |g|; on the first batch's device.
        decay_strengths: for each batch, the strength of the weight decay of its tensors; None where nothing decays.
    """

    magnitude: Tensor
    decay_strengths: list[Tensor] | list[None]

    @classmethod
    def of(cls, batches: Sequence[Batch], measured: Sequence[Magnitudes]) -> GroupSums:
        """Over the batches of a group, whichever devices they are on."""
        device = measured[0].abs_sums.device
        abs_sums = torch.cat([m.abs_sums.to(device) for m in measured])
        magnitude = agr.magnitude_sum(abs_sums, torch.stack([m.nonzero_count.to(device) for m in measured]))
        deviations = [m.deviations.to(device) for m in measured if m.deviations is not None]
        if not deviations:
            return cls(magnitude, [None] * len(batches))
        sizes = [batch.rows * batch.columns for batch in batches]
        counts = torch.cat([torch.full_like(m.abs_sums, size) for m, size in zip(measured, sizes)]).to(device)
        strengths = weight_decay.decay_strengths(abs_sums / counts, torch.cat(deviations), counts)
        parts = strengths.split([len(batch) for batch in batches])
        return cls(magnitude, [part.to(batch.params[0].device) for part, batch in zip(parts, batches)])

"""The rules through torch.compile, and without it where compiling fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import Phase, States, StepScalars, Watched, take_step_

logger = logging.getLogger(__name__)


class FusedRules:
    """Calls `rules.take_step_` compiled: one graph for each combination of phase and options, whatever the shapes."""

    def __init__(self) -> None:
        self._compiled: Any = torch.compile(take_step_, dynamic=True, fullgraph=True)
        self._broken = False

    def take_step_(
        self, p: Tensor, g: Tensor, states: States, *, scalars: StepScalars, phase: Phase, **more: Any
    ) -> Watched | None:
        """As `rules.take_step_`; the first call of each graph compiles it, which takes seconds."""
        if not self._broken:
            try:
                config = more["config"]
                momenta = dict(zip(scalars.scale_names, scalars.scale_rates))
                loaded = _Loaded(states, (*phase.state_names(config.came), *momenta))
                watched = self._compiled(p, g, loaded, scalars=_as_tensors(scalars), phase=phase, **more)
                # One graph serves all steps, so it also hands back momenta that it has left as they are.
                loaded.keep(states, leave={name for name, rate in momenta.items() if rate == 0})
                return watched
            except Exception as error:
                # A graph is compiled before anything of it runs, so nothing has changed yet.
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                self._broken = True
                reason = str(error).strip().partition("\n")[0]
                logger.warning("fused: compiling failed, the rules run uncompiled from here on: %s", reason)
        return take_step_(p, g, states, scalars=scalars, phase=phase, **more)


class _Loaded:
    """States read beforehand, for a graph that knows no storages."""

    def __init__(self, states: States, names: tuple[str, ...]) -> None:
        self._stacks = {name: states.read(name) for name in names}
        self._written: dict[str, Tensor] = {}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self._stacks[name]

    def move(self, name: str, target: Tensor, rate: Tensor, out: Tensor | None = None) -> Tensor:
        return self._stacks[name].lerp_(target, rate)

    def add_to(self, stack: Tensor, shares: Sequence[tuple[str, Tensor]], out: Tensor | None = None) -> None:
        for name, share in shares:
            stack.addcmul_(self._stacks[name], share)

    def write(self, name: str, stack: Tensor) -> None:
        self._written[name] = stack

    def keep(self, states: States, leave: set[str]) -> None:
        """Write what was written, but for the states to leave."""
        for name, stack in self._written.items():
            if name not in leave:
                states.write(name, stack)


def _as_tensors(scalars: StepScalars) -> StepScalars:
    """Numbers that change with the step as 0-d tensors: as Python numbers each would be compiled into the graph."""
    momentum_rate, gradient_share, clip_bound, scheduler, scale_names, scale_rates, scale_shares = scalars
    return StepScalars(
        torch.tensor(momentum_rate, dtype=torch.float32),
        torch.tensor(gradient_share, dtype=torch.float32),
        torch.tensor(clip_bound, dtype=torch.float32),
        torch.tensor(1.0 if scheduler is None else scheduler, dtype=torch.float32),
        scale_names,
        tuple(torch.tensor(rate, dtype=torch.float32) for rate in scale_rates),
        tuple(torch.tensor(share, dtype=torch.float32) for share in scale_shares),
    )

"""The rules through torch.compile, and without it where compiling fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import Phase, Scalar, States, StepScalars, Watched, take_step_

logger = logging.getLogger(__name__)


# Graphs beyond this number would be refused: three phases with and without what a stack may have.
_MOST_GRAPHS = 64

# What a graph works on a copy of, and hands back, instead of changing it. Graphs that change all of their inputs are
# beyond PyTorch 2.13's C++ code generator, which loses track of buffers (KeyError); and of the gradients nobody needs
# what is left, so this copy is free.
_COPIED = ("exp_avg",)


class FusedRules:
    """Calls `rules.take_step_` compiled: one graph for each combination of phase and options, whatever the shapes."""

    def __init__(self) -> None:
        self._compiled: Any = torch.compile(_take_step_apart, dynamic=True, fullgraph=True)
        self._broken = False

    def take_step_(
        self, p: Tensor, g: Tensor, states: States, *, scalars: StepScalars, phase: Phase, **more: Any
    ) -> Watched | None:
        """As `rules.take_step_`; the first call of each graph compiles it, which takes seconds."""
        if not self._broken:
            try:
                config = more["config"]
                momenta = dict(zip(scalars.scale_names, scalars.scale_rates))
                stacks = {name: states.read(name) for name in (*phase.state_names(config.came), *momenta)}
                with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
                    written, watched = self._compiled(p, g, stacks, scalars=_as_tensors(scalars), phase=phase, **more)
                for name, stack in written.items():
                    # One graph serves all steps, so it also hands back momenta that it has left as they are.
                    if momenta.get(name) != 0:
                        states.write(name, stack)
                return watched
            except Exception as error:
                # A graph is compiled before anything of it runs, so nothing has changed yet.
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                self._broken = True
                reason = str(error).strip().partition("\n")[0]
                logger.warning("fused: compiling failed, the rules run uncompiled from here on: %s", reason)
        return take_step_(p, g, states, scalars=scalars, phase=phase, **more)


def _take_step_apart(
    p: Tensor, g: Tensor, stacks: dict[str, Tensor], **more: Any
) -> tuple[dict[str, Tensor], Watched | None]:
    """The step as a graph can hold it: states go in and come out as tensors, whatever they are stored in."""
    copies = {name: stack.clone() if name in _COPIED else stack for name, stack in stacks.items()}
    states = _Loaded(copies)
    watched = take_step_(p, g.clone(), states, **more)
    return states.written, watched


class _Loaded:
    """States read beforehand, for a graph that knows no storages."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        self._stacks = stacks
        self.written: dict[str, Tensor] = {}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self._stacks[name]

    def move(self, name: str, target: Tensor, rate: Scalar, out: Tensor | None = None) -> Tensor:
        return self._stacks[name].lerp_(target, rate)

    def add_to(self, stack: Tensor, shares: Sequence[tuple[str, Scalar]], out: Tensor | None = None) -> None:
        for name, share in shares:
            stack.add_(self._stacks[name] * share)

    def write(self, name: str, stack: Tensor) -> None:
        self.written[name] = stack


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

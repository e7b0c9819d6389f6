"""The rules through torch.compile, and without it where compiling fails."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .rules import StepScalars, take_step_

logger = logging.getLogger(__name__)


class FusedRules:
    """Calls `rules.take_step_` compiled: one graph for each combination of phase and options, whatever the shapes."""

    def __init__(self) -> None:
        self._compiled: Any = torch.compile(take_step_, dynamic=True)
        self._broken = False

    def take_step_(self, *stack: Any, **more: Any) -> None:
        """As `rules.take_step_`; the first call of each graph compiles it, which takes seconds."""
        if not self._broken:
            try:
                self._compiled(*stack, **{**more, "scalars": _as_tensors(more["scalars"])})
                return
            except Exception as error:
                # A graph is compiled before anything of it runs, so nothing has changed yet.
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                self._broken = True
                reason = str(error).strip().partition("\n")[0]
                logger.warning("fused: compiling failed, the rules run uncompiled from here on: %s", reason)
        take_step_(*stack, **more)


def _as_tensors(scalars: StepScalars) -> StepScalars:
    """Numbers that change with the step as 0-d tensors: as Python numbers each would be compiled into the graph."""
    momentum_rate, gradient_share, clip_bound, scheduler = scalars
    return StepScalars(
        torch.tensor(momentum_rate),
        torch.tensor(gradient_share),
        torch.tensor(clip_bound),
        torch.tensor(1.0 if scheduler is None else scheduler),
    )

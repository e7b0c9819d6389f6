"""The two passes of a step over a group: measure its gradients, then take every stack through the rules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import Group, States
from ..rounding import stochastic_round
from ..stacks.stack import Stack
from ..stacks.workspace import Workspace
from . import measure
from .kernels.gpu.launching import Launcher
from .measure import GroupSums
from .rules import StackOptions, StepScalars, Techniques, Watched, take_step_


class Measured(NamedTuple):
    """A group after the first pass over its gradients.

    Attributes:
        group: the group.
        stacks: those that take the step; what follows, except `sums`, is for each of them.
        sums: what the rules need to know of its gradients as a whole.
        unusable: how many gradient elements are not usable, 0-d.
        watched: the gradient's elements that the context sees; empty without a context.
        gradients: the usable gradients, if they are held for the second pass, which takes them out.
        launcher: what launches kernels on its device; None where no kernels ran.
    """

    group: Group
    stacks: list[Stack]
    sums: GroupSums
    unusable: list[Tensor]
    watched: list[Tensor]
    gradients: list[Tensor | None]
    launcher: Launcher | None = None


class Passes:
    """What the groups of an optimizer share in one step.

    Args:
        states: the optimizer's.
        workspace: memory to compute in.
        watch_every: distance between the elements that the context sees of each tensor; 0 without a context.
        techniques: the rule in each place.
    """

    def __init__(self, states: States, workspace: Workspace, watch_every: int, techniques: Techniques) -> None:
        self._states = states
        self._workspace = workspace
        self._watch_every = watch_every
        self._techniques = techniques

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of the stacks that take the step."""
        decays = group.config.weight_decay > 0 and any(group.phase(stack).early for stack in stacks)
        magnitudes, unusable, watched, held = [], [], [], []
        for stack in stacks:
            work = self._workspace.lend(stack)
            g = stack.gradients(work.gradients)
            found = measure.first_pass(g, decays, self._watch_every, work.scratch)
            magnitudes.append(found.magnitudes)
            unusable.append(found.unusable)
            if found.watched is not None:
                watched.append(found.watched)
            held.append(g if self._workspace.holds(stack) else None)
            del g, found, work
        return Measured(group, stacks, GroupSums.of(stacks, magnitudes), unusable, watched, held)

    def update(self, measured: Measured, multiplier: Tensor | None) -> list[Watched]:
        """Second pass: every stack through the rules, and the weights written back.

        Args:
            measured: what the first pass found; the gradients that it holds are taken out.
            multiplier: 0-d factor of all learning rates; None if no context drives the optimizer.

        Returns:
            What the context sees of each stack; nothing without a context.
        """
        group, sums = measured.group, measured.sums
        watched = []
        for stack, decay in zip(measured.stacks, sums.decay_strengths):
            seen = self._update(group, stack, measured.gradients, sums.magnitude, decay, multiplier)
            if seen is not None:
                watched.append(seen)
        return watched

    def _update(
        self,
        group: Group,
        stack: Stack,
        gradients: list[Tensor | None],
        magnitude_sum: Tensor,
        decay: Tensor | None,
        multiplier: Tensor | None,
    ) -> Watched | None:
        """One stack through the rules. Gradients that were not held are gathered again."""
        group.bind(stack, self._states)
        traits, config = stack.traits, group.config
        scalars = StepScalars.at(traits.step, config, group.scheduler_factor, traits.momentum_counts)
        options = StackOptions(
            group.phase(stack), traits.has_polarity, traits.row_scaled, config, self._watch_every, self._techniques
        )
        work = self._workspace.lend(stack)
        held = gradients.pop(0)
        g = stack.gradients(work.gradients) if held is None else held
        total = magnitude_sum.to(g.device)
        factor = None if multiplier is None else multiplier.to(g.device)
        if held is None:
            measure.drop_unusable_(g, work.scratch)
        p, watched = take_step_(g, stack, total, decay, factor, work, scalars, options)
        del g, held, work
        dtype = stack.params[0].dtype
        if dtype in (torch.bfloat16, torch.float16):
            p = stochastic_round(p, dtype, stack.dither())
        stack.write_weights(p)
        return watched

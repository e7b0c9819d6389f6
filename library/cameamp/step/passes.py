"""The two passes of a step over a group: measure its gradients, then take every stack through the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import MAGNITUDES, Group, States
from ..rounding import stochastic_round
from ..sharding import ALONE, WHOLE, Processes, added_by
from ..stacks.stack import Stack
from ..stacks.workspace import Work, Workspace
from ..techniques.sums import OF_WHOLE_TENSORS, Sums
from . import measure, shared
from .kernels.gpu.launching import Launcher
from .measure import GroupSums, Magnitudes
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
        magnitudes: those of each stack, or of the part of it that this process holds; empty from kernels of a GPU.
        answers: for each stack that is sharded, what the second pass asks of the other processes.
    """

    group: Group
    stacks: list[Stack]
    sums: GroupSums
    unusable: list[Tensor]
    watched: list[Tensor]
    gradients: list[Tensor | None]
    launcher: Launcher | None = None
    magnitudes: Sequence[Magnitudes] = ()
    answers: Mapping[Stack, list[shared.Answer]] = MappingProxyType({})
    by_numba: bool = False


class Passes:
    """What the groups of an optimizer share in one step.

    Args:
        states: the optimizer's.
        workspace: memory to compute in.
        watch_every: distance between the elements that the context sees of each tensor; 0 without a context.
        techniques: the rule in each place.
        processes: those that hold the parameters.
    """

    def __init__(
        self,
        states: States,
        workspace: Workspace,
        watch_every: int,
        techniques: Techniques,
        processes: Processes = ALONE,
    ) -> None:
        self._states = states
        self._workspace = workspace
        self._watch_every = watch_every
        self._techniques = techniques
        self._processes = processes

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of the stacks that take the step."""
        decays = group.config.weight_decay > 0 and any(group.phase(stack).early for stack in stacks)
        magnitudes, unusable, watched, held = [], [], [], []
        for stack in stacks:
            work = self._workspace.lend(stack)
            g = stack.gradients(work.gradients)
            found = measure.first_pass(g, decays, self._watch_every, work.scratch, self._watch_from(stack))
            magnitudes.append(found.magnitudes)
            unusable.append(found.unusable)
            if found.watched is not None:
                watched.append(found.watched)
            held.append(g if self._workspace.holds(stack) else None)
            del g, found, work
        return Measured(
            group,
            stacks,
            GroupSums.of(stacks, magnitudes, group.entry.get(MAGNITUDES)),
            unusable,
            watched,
            held,
            magnitudes=magnitudes,
        )

    def add_up(self, measured: Sequence[Measured], more: Sequence[Tensor]) -> tuple[list[Measured], list[Tensor]]:
        """What was measured of groups, with the sums over whole tensors; one message if any are sharded.

        Args:
            measured: what the first pass found in each group.
            more: what else to add up over the processes, on the way.

        Returns:
            The same of all processes, and the sums of `more`.
        """
        found = {stack: of_stack for group in measured for stack, of_stack in zip(group.stacks, group.magnitudes)}
        sharded = [stack for stack in found if stack.cut is not WHOLE]
        if not sharded:
            return list(measured), list(more)
        own = [added_by(self._processes, s.cut, shared.measured_parts(s, found[s])) for s in sharded]
        totals = self._processes.add_up([*own, *more])
        found |= {stack: shared.whole_magnitudes(stack, total) for stack, total in zip(sharded, totals)}
        whole = [
            each._replace(sums=GroupSums.of(each.stacks, [found[stack] for stack in each.stacks]))
            if any(stack.cut is not WHOLE for stack in each.stacks)
            else each
            for each in measured
        ]
        return whole, totals[len(sharded) :]

    def questions(self, measured: Measured, multiplier: Tensor | None) -> dict[Stack, shared.Questions]:
        """What the rules ask of the other processes before the second pass, about the tensors that are sharded.

        Args:
            measured: from `add_up`.
            multiplier: 0-d factor of all learning rates; None if no context drives the optimizer.
        """
        group, sums = measured.group, measured.sums

        def rehearse(stack: Stack, decay: Tensor | None, of_shards: Sums) -> None:
            work = self._workspace.lend(stack)
            g = stack.gradients(work.gradients)
            measure.drop_unusable_(g, work.scratch)
            others = self._arguments(group, stack, work, sums.magnitude, decay, multiplier)
            take_step_(g, stack.rehearsal(), *others, of_shards)

        found: dict[Stack, shared.Questions] = {}
        for stack, decay in zip(measured.stacks, sums.decay_strengths):
            if stack.cut is not WHOLE:
                group.bind(stack, self._states)
                scales = StepScalars.of(group, stack.traits).scales
                number = sum(shared.Asks.of(group, stack, scales))
                found[stack] = shared.Rehearsals(stack, scales, number, partial(rehearse, stack, decay))
        return found

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
            known = None if stack.cut is WHOLE else measured.answers[stack]
            seen = self._update(group, stack, measured.gradients, sums.magnitude, decay, multiplier, known)
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
        answers: Sequence[shared.Answer] | None,
    ) -> Watched | None:
        """One stack through the rules. Gradients that were not held are gathered again."""
        group.bind(stack, self._states)
        work = self._workspace.lend(stack)
        held = gradients.pop(0)
        g = stack.gradients(work.gradients) if held is None else held
        arguments = self._arguments(group, stack, work, magnitude_sum, decay, multiplier)
        if held is None:
            measure.drop_unusable_(g, work.scratch)
        sums = OF_WHOLE_TENSORS
        if answers is not None:
            sums = shared.SumsOfShards(stack, StepScalars.of(group, stack.traits).scales, answers)
        p, watched = take_step_(g, stack, *arguments, sums)
        del g, held, work, arguments
        dtype = stack.params[0].dtype
        if dtype in (torch.bfloat16, torch.float16):
            p = stochastic_round(p, dtype, stack.dither())
        stack.write_weights(p)
        return watched

    def _arguments(
        self,
        group: Group,
        stack: Stack,
        work: Work,
        magnitude_sum: Tensor,
        decay: Tensor | None,
        multiplier: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Work, StepScalars, StackOptions]:
        """Those of `take_step_` between the states and the sums."""
        total = magnitude_sum.to(stack.device)
        factor = None if multiplier is None else multiplier.to(stack.device)
        return total, decay, factor, work, StepScalars.of(group, stack.traits), self._options(group, stack)

    def _options(self, group: Group, stack: Stack) -> StackOptions:
        return StackOptions(
            group.phase(stack),
            stack.traits.has_polarity,
            stack.traits.row_scaled,
            group.config,
            self._watch_every,
            self._techniques,
            self._watch_from(stack),
        )

    def _watch_from(self, stack: Stack) -> int:
        """The first element that is here of those that the context sees."""
        return -stack.first_element % self._watch_every if self._watch_every else 0

"""A kernel against the rules, on copies of a few tensors of a real step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...groups import Group, States
from ...sharding import ALONE
from ...stacks.stack import ParameterState, Stack
from ...stacks.workspace import Workspace
from ...storage import Spread
from .. import shared
from ..measure import GroupSums
from ..passes import Measured, Passes
from ..rules import Techniques

# So many tensors, none of more elements: a check is to cost about as much as a step of a few of them.
_TENSORS = 3
_LARGEST = 128 * 1024

# Of fewer elements a step may lie along the weights but for rounding, which kernels and rules treat differently.
_SMALLEST = 16

# Weights as large as this overflow in anybody's squares, and those that are not finite have no step to compare.
_LARGEST_WEIGHT = 1e9

# Of the size of a change, or of a state. Rounding alone stays below 1e-5 where nothing is coded; a code that falls on
# the other side of a midpoint, or a weight of 16 bits, is one of very many elements.
_TOLERANCE = 0.02

# What rounding alone leaves of states that are 0, and of weights that hardly change, as a share of their size.
_FLOOR = 1e-30
_FLOOR_OF_WEIGHTS = 1e-7

# Takes the step of a group whose stacks are copies.
TakeStep = Callable[[Measured, States], None]


def difference(
    measured: Measured, states: States, multiplier: Tensor | None, techniques: Techniques, takers: Sequence[TakeStep]
) -> str:
    """How some ways to take a step differ from the rules, beyond rounding; "" if none does.

    Of a shard, both take it as if it were all that there is: that is to say as much of kernels, and takes no message.

    Args:
        measured: a group before the second pass of a step.
        states: the optimizer's.
        multiplier: 0-d factor of all learning rates, or None.
        techniques: the rule in each place.
        takers: the ways; each gets copies of a few tensors.
    """
    group = measured.group
    for number in _few(group, measured.stacks):
        stack = measured.stacks[number]
        strengths = measured.sums.decay_strengths[number]
        sums = GroupSums(measured.sums.magnitude, [None] if strengths is None else [strengths[:1]])
        expected = _Copy(group, stack, states, sums)
        rules = Passes(expected.states, Workspace(), 0, techniques)
        answers = shared.answers(rules.questions(expected.measured, multiplier), ALONE)
        rules.update(expected.measured._replace(answers=answers), multiplier)
        before = _apart(expected.here(stack.params[0].detach()))
        for take_step in takers:
            found = _Copy(group, stack, states, sums)
            take_step(found.measured, found.states)
            reason = _compare(found, expected, before)
            if reason:
                return f"{reason}, in a parameter of shape {tuple(stack.params[0].shape)}"
    return ""


def _few(group: Group, stacks: Sequence[Stack]) -> list[int]:
    """The numbers of some stacks, of whose tensors the first is checked: the largest that are not too large."""
    small = [
        number
        for number, stack in enumerate(stacks)
        if _SMALLEST <= stack.rows * stack.columns <= _LARGEST and stack.params[0] not in group.uncoded
    ]
    small.sort(key=lambda number: -stacks[number].rows * stacks[number].columns)
    return small[:_TENSORS]


class _Copy:
    """The first tensor of a stack with everything that its step needs, as a stack of its own."""

    def __init__(self, group: Group, stack: Stack, states: States, sums: GroupSums) -> None:
        p = stack.params[0]
        assert p.grad is not None
        self._cut = stack.cut
        copies = [_apart(self.here(p.detach())), self.here(p.grad).clone()]
        self.p, self.p.grad = stack.cut.wrapped(copies, Spread.BY_ROW, stack.whole_rows)
        own: ParameterState = {
            key: self.here(value).clone() if torch.is_tensor(value) else value for key, value in states[p].items()
        }
        self.states: States = {self.p: own}
        self.stack = Stack([self.p], [stack.parameter_numbers[0]], stack.traits)
        group.bind(self.stack, self.states)
        self.measured = Measured(group, [self.stack], sums, [], [], [None])

    def here(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that this process holds."""
        return self._cut.local([tensor])[0]


def _apart(p: Tensor) -> Tensor:
    """Weights of which a step is to be compared, a copy: with every second element halved.

    A step along the weights but for rounding, as weights that are all alike and their gradients have it, is turned off
    them by the orthogonal gradient into whatever rounding has left.
    """
    usable = p.isfinite() & (p.abs() <= _LARGEST_WEIGHT)
    apart = torch.where(usable, p, torch.ones_like(p)).contiguous().clone()
    apart.view(-1)[1::2] *= 0.5
    return apart


def _compare(found: _Copy, expected: _Copy, before: Tensor) -> str:
    """What differs between two copies that took the same step; "" for nothing."""
    changes = [(copy.here(copy.p).double() - before.double()).flatten() for copy in (found, expected)]
    floor_of_weights = _FLOOR_OF_WEIGHTS * float(torch.linalg.vector_norm(before.double()))
    pairs = {"weights": (changes[0], changes[1], floor_of_weights)}
    for name, stored in expected.stack.stored.items():
        pairs[f"state '{name}'"] = (found.stack.stored[name].read().double(), stored.read().double(), _FLOOR)
    for name, (x, y, floor) in pairs.items():
        size, error = float(torch.linalg.vector_norm(y)), float(torch.linalg.vector_norm(x - y))
        if not error <= _TOLERANCE * size + floor:
            return f"the {name} differ by {error:.2g} from {size:.2g}"
    return ""

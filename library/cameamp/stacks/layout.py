"""Which parameters of a group are stacked together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stack import Stack, Traits, largest_part, stacked_shape

# Sizes are what the process with most of a tensor holds of it, so that all processes build the same stacks.

# At most this many elements side by side: the half dozen temporary stacks of the rules, 25 MiB each, stay well under
# 256 MiB.
LARGEST_STACK = 6_500_000
# Larger stacks launch fewer operations, smaller ones stay in a CPU's caches. About a dozen do well at both; asking
# for seven gives about that many, because every shape begins a new one.
_STACKS = 7
_SMALLEST_STACK = 512 * 1024
# The largest stack that a CPU keeps in its caches, or nearly, while much is done to it.
_LARGEST_CACHED = 2 * 1024 * 1024


class Layout:
    """Divides the parameters of one group into stacks, and keeps a stack as long as its members stay together.

    Args:
        cached: whether stacks on a CPU are to stay in its caches. That pays if much is done to each.
    """

    def __init__(self, cached: bool) -> None:
        self._cached = cached
        self._known: dict[int, Stack] = {}
        self._last: _Division | None = None

    def stacks(self, params: Sequence[tuple[int, Tensor, Traits]]) -> tuple[list[Stack], list[Tensor]]:
        """Stacks of parameters whose shape (as stacked), dtype, device and traits agree.

        Args:
            params: position in the optimizer, the parameter and its traits.

        Returns:
            The stacks, and the parameters that are in none of them but were in a stack that no longer exists.
        """
        kinds = _Kinds.of([p for _, p, _ in params], [traits for _, _, traits in params])
        if self._last is not None and self._last.holds(kinds):
            return self._last.stacks, []
        alike: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        total = 0
        for position, p, traits in params:
            alike.setdefault((stacked_shape(p.shape), p.dtype, p.device, traits), []).append((position, p))
            total += largest_part(p.shape, traits.cut)
        result: dict[int, Stack] = {}
        for (shape, _, device, traits), members in alike.items():
            largest = _LARGEST_CACHED if self._cached and device.type == "cpu" else LARGEST_STACK
            limit = min(max(total // _STACKS, _SMALLEST_STACK), largest)
            size = largest_part(shape, traits.cut)
            parts = math.ceil(len(members) * size / max(limit, size))
            length = math.ceil(len(members) / parts)
            for start in range(0, len(members), length):
                result[members[start][0]] = self._stack(members[start : start + length], traits)
        dropped = [stack for position, stack in self._known.items() if result.get(position) is not stack]
        self._known = result
        # Stacks too large for the workspace come first, all together: its memory is given up while they are worked on.
        ordered = sorted(
            result.values(),
            key=lambda stack: len(stack) * largest_part(stack.params[0].shape, stack.cut) <= LARGEST_STACK,
        )
        present = {p for _, p, _ in params} if dropped else set()
        self._last = _Division(kinds, ordered)
        return ordered, [p for stack in dropped for p in stack.params if p not in present]

    def _stack(self, members: list[tuple[int, Tensor]], traits: Traits) -> Stack:
        positions = [position for position, _ in members]
        params = [p for _, p in members]
        known = self._known.get(positions[0])
        if known is not None and len(known) == len(params) and all(a is b for a, b in zip(known.params, params)):
            known.traits = traits
            return known
        return Stack(params, positions, traits)


class _Kinds(NamedTuple):
    """What decides about the division of some parameters; an entry for each."""

    params: list[Tensor]
    traits: list[Traits]
    dtypes: list[torch.dtype]
    devices: list[torch.device]

    @classmethod
    def of(cls, params: list[Tensor], traits: list[Traits]) -> _Kinds:
        return cls(params, traits, [p.dtype for p in params], [p.device for p in params])


class Singles:
    """In place of `Layout`: each parameter in a stack of its own, for steps that are taken one by one."""

    def __init__(self) -> None:
        self._known: dict[int, Stack] = {}

    def stacks(self, params: Sequence[tuple[int, Tensor, Traits]]) -> tuple[list[Stack], list[Tensor]]:
        """As `Layout.stacks`; no parameter is ever left behind."""
        result = []
        for position, p, traits in params:
            stack = self._known.get(position)
            if stack is None or stack.params[0] is not p:
                stack = self._known[position] = Stack([p], [position], traits)
            stack.traits = traits
            result.append(stack)
        return result, []


class _Division:
    """How the parameters of a step were divided, so that the next step need not do it again.

    Args:
        kinds: of the parameters.
        stacks: the stacks.
    """

    def __init__(self, kinds: _Kinds, stacks: list[Stack]) -> None:
        self._kinds = kinds
        self.stacks = stacks

    def holds(self, kinds: _Kinds) -> bool:
        """Whether the same parameters are together again, with other traits now; the stacks get these."""
        last = self._kinds
        if len(kinds.params) != len(last.params) or not all(map(is_, kinds.params, last.params)):
            return False
        if kinds.dtypes != last.dtypes or kinds.devices != last.devices:
            return False
        # By identity: hashing them for each parameter would take as long as dividing.
        pairs = dict(zip(zip(map(id, last.traits), map(id, kinds.traits)), zip(last.traits, kinds.traits)))
        now = dict(pairs.values())
        if not len(pairs) == len(now) == len(set(now.values())):
            return False  # Those that were together are apart, or the other way round.
        for stack in self.stacks:
            stack.traits = now[stack.traits]
        self._kinds = kinds
        return True

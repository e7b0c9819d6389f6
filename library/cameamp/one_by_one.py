"""Steps of single parameters inside the backward pass, each as soon as its gradient is whole, so that it can be freed.

The gradients of a group are then never there together. What a step needs to know of all of them is of the step before:
AGR's sum, the mean and the variance of the magnitudes, and the multiplier of a context. Everything else is as in an
ordinary step.

In a backward pass on a CPU gradients wait for others as long as all take less memory than the two largest ones, or
until the pass ends: a step of many small tensors takes hardly longer than that of one. The next gradient is taken to be
as large as the largest of the few parameters before this one, as it is where a model's blocks are in the order of the
forward pass. On a GPU gradients do not wait: trainers that swap blocks send weights away in the middle of the pass.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .context.driver import Driver
from .groups import MAGNITUDES, Group, States
from .parameters import Parameters
from .sharding import WHOLE
from .stacks.stack import Stack
from .step import measure
from .step.engine import Engine
from .step.passes import Measured
from .step.rules import Techniques, Watched

logger = logging.getLogger(__name__)

# So many gradient elements do wait, however small the largest parameters are.
_FEW_WAITING = 2 * 1024 * 1024


@dataclass(frozen=True)
class Parts:
    """What a step needs of an optimizer.

    Attributes:
        groups: its groups.
        parameters: all of its parameters, located.
        states: its states.
        driver: what drives its learning rates.
        engine: what chooses between kernels and rules.
        techniques: the rule in each place.
        tallies: for each device, how many gradient elements were not usable.
    """

    groups: Sequence[Group]
    parameters: Parameters
    states: States
    driver: Driver
    engine: Engine
    techniques: Techniques
    tallies: dict[torch.device, Tensor]


class OneByOne:
    """Takes the steps of single parameters, and ends a step that was taken so."""

    def __init__(self) -> None:
        self._under_way: _UnderWay | None = None
        # A backward pass over several GPUs calls hooks from several threads.
        self._lock = threading.RLock()

    @property
    def is_under_way(self) -> bool:
        """Whether parameters have been stepped since the last step ended."""
        return self._under_way is not None

    def forget(self) -> None:
        """Drop the step that is under way: its states are others now."""
        self._under_way = None

    def take(self, p: Tensor, entry: Mapping[str, Any], index: int | None, parts: Parts) -> None:
        """Step one parameter, if it has a gradient. If it was stepped before, another step begins.

        Args:
            p: the parameter.
            entry: its group's entry of `param_groups`.
            index: its place in the group; None if it is not known.
            parts: the optimizer's.

        Raises:
            ValueError: the group does not have the parameter, or not in this place.
            RuntimeError: a gradient that no rule can use, or the parameter is sharded.
        """
        group = _group_of(p, entry, index, parts)
        if not measure.with_gradient([p]):
            return
        if parts.parameters.cut(p) is not WHOLE:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} is sharded; step_parameter takes whole parameters, call step()"
            )
        with self._lock:
            if self._under_way is not None and p in self._under_way:
                self.finish(parts)
            if self._under_way is None:
                for each in parts.groups:
                    if not each.apart:
                        each.restart(apart=True)
                self._under_way = _UnderWay(parts)
            end = _End(self)
            if p.device.type != "cpu" or not _after_backward(end):
                _take(group, [p], parts, self._under_way)
            else:
                expected = self._under_way.wait(group, p, end) + parts.parameters.elements_after(p)
                if expected >= max(parts.parameters.two_largest, _FEW_WAITING):
                    self.take_waiting()

    def finish(self, parts: Parts, take_rest: bool = False) -> None:
        """End the step that is under way.

        Args:
            parts: the optimizer's.
            take_rest: first step the parameters that have a gradient and were not stepped.
        """
        self.take_waiting()
        under_way = self._under_way
        assert under_way is not None
        if under_way.dropped:
            logger.warning(
                "a backward pass failed: %d gradients that waited for their steps were dropped", under_way.dropped
            )
        for group in parts.groups if take_rest else ():
            rest = [p for p in measure.with_gradient(group.params) if p not in under_way]
            if rest:
                _take(group, rest, parts, under_way)
        self._under_way = None
        measured = under_way.all_measured()
        for found in measured:
            measure.tally(parts.tallies, found.unusable)
            found.group.entry[MAGNITUDES] = measure.summary(found.stacks, found.magnitudes)
        parts.driver.observe(parts.groups, measured)
        parts.driver.follow(parts.groups, measured, under_way.all_watched())

    @torch.no_grad()
    def take_waiting(self) -> None:
        """Step the parameters whose gradients wait."""
        with self._lock:
            under_way = self._under_way
            if under_way is None:
                return
            for group, gradients in under_way.pop_waiting().items():
                newer = {p: p.grad for p in gradients}  # usually none
                try:
                    for p, gradient in gradients.items():
                        p.grad = gradient
                    _take(group, list(gradients), under_way.parts, under_way)
                finally:
                    for p in gradients:
                        p.grad = newer[p]


class _End:
    """What is called at the end of a backward pass, and dies with it even if it fails."""

    def __init__(self, steps: OneByOne) -> None:
        self._steps = steps

    def __call__(self) -> None:
        self._steps.take_waiting()


def _after_backward(call: Callable[[], None]) -> bool:
    """Have something called at the end of the backward pass that is running. Returns False if none is."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(call)
    except RuntimeError:
        return False
    return True


def _group_of(p: Tensor, entry: Mapping[str, Any], index: int | None, parts: Parts) -> Group:
    if p in parts.parameters:
        place = parts.parameters.position(p)
        for group in parts.groups:
            if group.entry is entry and 0 <= place < len(group.params) and index in (None, place):
                return group
            place -= len(group.params)
    raise ValueError(
        f"step_parameter: a parameter of shape {tuple(p.shape)} is not in the group that was given; allowed: a "
        "parameter, the entry of this optimizer's param_groups that has it, and its place there"
    )


class _UnderWay:
    """A step of which some parameters have been taken.

    Args:
        parts: the optimizer's.

    Attributes:
        parts: the same.
        multiplier: 0-d factor of all learning rates in this step; None if no context drives the optimizer.
        dropped: how many gradients waited when their backward pass failed.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.multiplier = parts.driver.multiplier()
        self.dropped = 0
        self._params: set[Tensor] = set()
        self._waiting: dict[Group, dict[Tensor, Tensor]] = {}
        self._waiting_elements = 0
        self._ends: list[weakref.ref[_End]] = []
        self._taken: dict[Group, list[tuple[Measured, list[Watched]]]] = {}

    def __contains__(self, p: Tensor) -> bool:
        return p in self._params

    def wait(self, group: Group, p: Tensor, end: _End) -> int:
        """Take a gradient away, for a step before `end` is gone. Returns how many elements wait in all."""
        assert p.grad is not None
        self._waiting.setdefault(group, {})[p] = p.grad
        p.grad = None  # What a trainer still did to it would change the step.
        self._params.add(p)
        self._waiting_elements += p.numel()
        self._ends.append(weakref.ref(end, lambda _: self._drop(group, p)))
        return self._waiting_elements

    def _drop(self, group: Group, p: Tensor) -> None:
        """The backward pass is over. What still waits has been left by one that failed, and belongs to no step."""
        if self._waiting.get(group, {}).pop(p, None) is not None:
            self._waiting_elements -= p.numel()
            self.dropped += 1

    def pop_waiting(self) -> dict[Group, dict[Tensor, Tensor]]:
        """The gradients that wait, of each group by parameter; none do from here on."""
        waiting, self._waiting, self._waiting_elements = self._waiting, {}, 0
        self._ends.clear()
        return {group: gradients for group, gradients in waiting.items() if gradients}

    def add(self, measured: Measured, watched: list[Watched]) -> None:
        """Note that the parameters of some stacks have been taken.

        Args:
            measured: what the first pass found in them.
            watched: what the context sees of each stack; nothing without a context.
        """
        self._params.update(p for stack in measured.stacks for p in stack.params)
        self._taken.setdefault(measured.group, []).append((measured, watched))

    def all_measured(self) -> list[Measured]:
        """What the first pass found in each group."""
        return [_joined(group, [measured for measured, _ in taken]) for group, taken in self._taken.items()]

    def all_watched(self) -> list[Watched]:
        """What the context sees, in the order of the stacks of `all_measured`."""
        return [seen for taken in self._taken.values() for _, watched in taken for seen in watched]


def _take(group: Group, params: list[Tensor], parts: Parts, under_way: _UnderWay) -> None:
    # At the first step each has its own sums alone.
    for together in [params] if MAGNITUDES in group.entry else [[p] for p in params]:
        _take_together(group, together, parts, under_way)


def _take_together(group: Group, params: list[Tensor], parts: Parts, under_way: _UnderWay) -> None:
    group.count_step(params, parts.states)
    stacks = group.stacks(params, parts.states)
    watched_at = parts.driver.watch_every(parts.groups), parts.driver.watch_places(parts.groups)
    # Those of GPUs are for many tensors at once.
    step = parts.engine.begin_step([(group, stacks)], parts.states, *watched_at, parts.techniques, kernels_on=("cpu",))
    measured = step.measure(group, stacks)
    watched = step.update(measured, under_way.multiplier)
    _, starts = watched_at
    measured = measured._replace(watched=[_own(stack, x, starts) for stack, x in zip(stacks, measured.watched)])
    under_way.add(measured, [Watched(*(_own(stack, x, starts) for x in seen)) for stack, seen in zip(stacks, watched)])


def _own(stack: Stack, watched: Tensor, starts: Sequence[int]) -> Tensor:
    """What is watched of a stack, (tensors, elements). Kernels give it in a vector with room for all parameters."""
    if watched.ndim > 1:
        return watched
    return torch.stack([watched[starts[n] : starts[n + 1]] for n in stack.parameter_numbers])


def _joined(group: Group, found: list[Measured]) -> Measured:
    """What was measured of parts of a group, one after the other. The sums are of the first part alone."""
    return Measured(
        group,
        list(chain.from_iterable(each.stacks for each in found)),
        found[0].sums,
        list(chain.from_iterable(each.unusable for each in found)),
        list(chain.from_iterable(each.watched for each in found)),
        [],
        magnitudes=list(chain.from_iterable(each.magnitudes for each in found)),
    )

"""Who takes a group's step: native kernels where there are some and they prove themselves, else the rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..groups import Group, States
from ..phase import Phase
from ..sharding import ALONE, WHOLE, Processes
from ..stacks.stack import Stack
from ..stacks.workspace import Workspace
from . import shared
from .passes import Measured, Passes
from .rules import ALL_TECHNIQUES, Techniques, Watched

logger = logging.getLogger(__name__)

_VERBOSE_EVERY = 100

# Said before a step that would otherwise look as if it hung.
_COMPILING = (
    "fused: kernels take the steps; those that are new on this machine are compiled at the first step of each phase, "
    "which then takes up to a minute"
)


class TakesSteps(Protocol):
    """The two passes of a step over a group; see `passes.Passes`."""

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over gradients."""

    def questions(self, measured: Measured, multiplier: Tensor | None) -> dict[Stack, shared.Questions]:
        """Between them: what the second one asks of the other processes."""

    def update(self, measured: Measured, multiplier: Tensor | None) -> list[Watched]:
        """Second pass: new states and weights."""


class Kernels(Protocol):
    """The kernels of one kind of device, as long as an optimizer's states stay."""

    def at_step(self, states: States, watch_every: int, watch_places: Sequence[int]) -> TakesSteps:
        """What takes the steps of groups now."""

    def difference(self, measured: Measured, states: States, multiplier: Tensor | None, techniques: Techniques) -> str:
        """How the kernels' step of a few tensors differs from that of the rules, beyond rounding; "" if it does not."""


class Engine:
    """Chooses between kernels and rules, group by group and step by step.

    Kernels prove themselves at the first step of each phase. Where one fails, the rules go on from there, with one
    warning; both work on the same states.
    """

    def __init__(self) -> None:
        self._failed = False
        self._said: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Drop what is cached about the parameters and states, which may be others now."""
        self._workspace = Workspace()
        self._kernels: dict[str, Kernels] = {}
        self._proved: set[tuple[int, Phase]] = set()

    def begin_step(
        self,
        groups: Sequence[tuple[Group, list[Stack]]],
        states: States,
        watch_every: int,
        watch_places: Sequence[int],
        techniques: Techniques,
        processes: Processes = ALONE,
        kernels_on: Collection[str] | None = None,
    ) -> Step:
        """Decide who takes the step of each group.

        Args:
            groups: those that take a step, with their stacks.
            states: the optimizer's.
            watch_every: distance between the elements that the context sees of each tensor; 0 without a context.
            watch_places: for each parameter, and one past the last, where its elements begin among all that it sees.
            techniques: the rule in each place.
            processes: those that hold the parameters.
            kernels_on: the types of devices on which kernels may take this step; None for all that have kernels.
        """
        served = {}
        for group, stacks in groups:
            device = stacks[0].device.type
            allowed = kernels_on is None or device in kernels_on
            if not allowed and group.config.fused is True:
                self._say(logging.WARNING, f"fused: no kernel of '{device}' takes single parameters, the rules do")
            kernels = self._kernels_of(group, stacks) if allowed and techniques == ALL_TECHNIQUES else None
            if kernels is not None:
                served[group] = kernels
        # Not gradients of shards, which a rehearsal overwrites.
        kept = [stack for group, own in groups if group not in served for stack in own if stack.cut is WHOLE]
        self._workspace.begin_step(kept)
        rules = Passes(states, self._workspace, watch_every, techniques, processes)
        return Step(self, rules, served, states, watch_every, watch_places, techniques, processes)

    def proves(self, measured: Measured, difference: Callable[[], str]) -> bool:
        """Whether kernels may take a step: at the first one of each phase they must not differ from the rules."""
        phases = {(measured.group.number, measured.group.phase(stack)) for stack in measured.stacks}
        if not phases <= self._proved:
            try:
                found = difference()
            except Exception as error:  # Compiling, or keeping the result, can fail in any way.
                found = _first_line(error)
            if found:
                self.give_up(found)
                return False
            self._proved |= phases
        return True

    def give_up(self, reason: str) -> None:
        """Let the rules take all steps from here on."""
        self._failed = True
        logger.warning("fused: the kernels do not work here, the rules go on without them: %s", reason)

    def _kernels_of(self, group: Group, stacks: Sequence[Stack]) -> Kernels | None:
        """The kernels that serve a group; None if the rules do."""
        fused = group.config.fused
        if fused is False or self._failed or not stacks:
            return None
        if group.config.factored:
            level = logging.WARNING if fused is True else logging.INFO
            self._say(level, "fused: no kernel reads factored states, the rules take the steps")
            return None
        device = stacks[0].device.type
        if device not in self._kernels:
            load = _LOADERS.get(device)
            if load is None or (fused == "auto" and device not in _AUTOMATIC):
                if fused is True:
                    self._say(logging.WARNING, f"fused: there are no kernels for the device '{device}'")
                return None
            try:
                self._kernels[device] = load()
            except ImportError as error:
                level = logging.WARNING if fused is True else logging.INFO
                self._say(level, f"fused: {_HELP[device]} ({_first_line(error)})")
                return None
            self._say(logging.INFO, _COMPILING)
        kernels, first = self._kernels[device], stacks[0].device
        params = [p for stack in stacks for p in stack.cut.local(stack.params)]
        served = (
            all(stack.most_rows * stack.columns <= _LARGEST for stack in stacks)
            and all(kind in _PLAIN for kind in set(map(type, params)))
            and all(p.device == first for p in params)
        )
        return kernels if served else None

    def _say(self, level: int, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.log(level, "%s", text)


class Step:
    """One step of an optimizer: each group's by kernels or by rules."""

    def __init__(
        self,
        engine: Engine,
        rules: Passes,
        served: dict[Group, Kernels],
        states: States,
        watch_every: int,
        watch_places: Sequence[int],
        techniques: Techniques,
        processes: Processes,
    ) -> None:
        self._engine = engine
        self._processes = processes
        self._rules = rules
        self._served = served
        self._states = states
        self._techniques = techniques
        self._takers = {kernels: kernels.at_step(states, watch_every, watch_places) for kernels in served.values()}

    def measure(self, group: Group, stacks: list[Stack]) -> Measured:
        """First pass, over the gradients of a group."""
        kernels = self._served.get(group)
        if kernels is not None:
            try:
                return self._takers[kernels].measure(group, stacks)
            except Exception as error:  # As in `Engine.proves`. Nothing has been changed yet.
                self._engine.give_up(_first_line(error))
                self._served = {}
        return self._rules.measure(group, stacks)

    def add_up(self, measured: Sequence[Measured], more: Sequence[Tensor]) -> tuple[list[Measured], list[Tensor]]:
        """As `Passes.add_up`."""
        return self._rules.add_up(measured, more)

    def ask(self, measured: Sequence[Measured], multiplier: Tensor | None) -> list[Measured]:
        """Between the passes: have the other processes answer what the second one asks about tensors that are sharded.

        Kernels prove themselves before that. Whether they do is for each process to see: all of them ask alike.
        """
        questions: dict[Stack, shared.Questions] = {}
        for found in measured:
            if any(stack.cut is not WHOLE for stack in found.stacks):
                questions |= self._taker_of(found, multiplier).questions(found, multiplier)
        if not questions:
            return list(measured)
        answers = shared.answers(questions, self._processes)
        return [found._replace(answers=answers) for found in measured]

    def update(self, measured: Measured, multiplier: Tensor | None) -> list[Watched]:
        """Second pass: new states and weights; returns what the context sees of each stack."""
        taker = self._taker_of(measured, multiplier)
        watched = taker.update(measured, multiplier)
        if taker is not self._rules:
            _note_change([p for stack in measured.stacks for p in stack.cut.local(stack.params)])
        _log_progress(measured.group, measured.stacks[0])
        return watched

    def _taker_of(self, measured: Measured, multiplier: Tensor | None) -> TakesSteps:
        """Who takes the second pass over a group: kernels that have proved themselves, or the rules."""
        kernels = self._served.get(measured.group)
        if kernels is not None and self._engine.proves(
            measured, lambda: kernels.difference(measured, self._states, multiplier, self._techniques)
        ):
            return self._takers[kernels]
        self._served.pop(measured.group, None)
        return self._rules


def _cpu_kernels() -> Kernels:
    from .kernels.cpu.step import CpuKernels

    return CpuKernels()


def _gpu_kernels() -> Kernels:
    from .kernels.gpu.launching import require_triton

    require_triton()
    from .kernels.gpu.passes import GpuKernels

    return GpuKernels()


_LOADERS: dict[str, Callable[[], Kernels]] = {"cpu": _cpu_kernels, "cuda": _gpu_kernels}
_AUTOMATIC = {"cpu"}
_HELP = {
    "cpu": "steps would take a third of the time with numba: pip install numba",
    "cuda": "the kernels of GPUs need Triton: pip install triton, on Windows pip install triton-windows",
}

# Kernels count the elements of a tensor in 32 bits.
_LARGEST = 2**31 - 1

# Other kinds hold their elements elsewhere, or only a part of them.
_PLAIN: tuple[Any, ...] = (torch.Tensor, torch.nn.Parameter)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _note_change(params: Sequence[Tensor]) -> None:
    """Let autograd know that kernels have changed weights, or it would use new ones for old activations."""
    increment = torch.autograd.graph.increment_version
    try:
        increment(params)
    except (AttributeError, TypeError, RuntimeError):  # before PyTorch 2.5; or one is of inference mode, and has none
        for p in params:
            if not p.is_inference():
                increment(p)


def _log_progress(group: Group, stack: Stack) -> None:
    """One line now and then, made of what is known without asking the device."""
    step = stack.traits.step
    if group.config.verbose and step % _VERBOSE_EVERY == 0:
        title, factor = group.phase(stack).title, group.scheduler_factor
        logger.info("group %d, step %d: %s, scheduler factor %.3g", group.number, step, title, factor)

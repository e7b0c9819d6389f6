"""What drives the learning rates of an optimizer: nothing, or a context that samples every step.

`NoContext` is the driver of the plain optimizers: it watches nothing and scales nothing, so that no caller has to ask
whether there is a context.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..config import OptimizerConfig
from ..groups import Group
from ..sharding import Alone, Processes, added_by
from ..step.passes import Measured
from ..step.rules import Watched
from .controller import STANDARD_LAW, ContextualOptimizationModule, Deciding, Law, as_scalar, attempted, report_of
from .sampling import Sampler

logger = logging.getLogger(__name__)

_Decision = TypeVar("_Decision")

# Options that groups of one optimizer share, because they share the context.
_SHARED = ("context_window", "edge_threshold", "adaptation_rate")


class Driver(Protocol):
    """What a step reports to, and asks of, whatever drives the learning rates."""

    def __init__(self, config: OptimizerConfig) -> None:
        """For an optimizer of these options."""

    def periods(self, config: OptimizerConfig) -> tuple[int, ...]:
        """The update periods of a group's multi-scale momenta."""

    def check_group(self, number: int, config: OptimizerConfig, shared: OptimizerConfig) -> None:
        """Raise ValueError if a new group changes an option that all groups share; `shared` has the optimizer's."""

    def groups_changed(self, groups: Sequence[Group]) -> None:
        """Take notice of the groups, and the parameters in them, as they are now."""

    def watch_every(self, groups: Sequence[Group]) -> int:
        """Distance between the elements of each tensor that are to be watched; 0 for none."""

    def watch_places(self, groups: Sequence[Group]) -> Sequence[int]:
        """For each parameter, and one past the last, where its watched elements begin among all; empty for none."""

    def report_loss(self, loss: Tensor | float) -> None:
        """Take in a loss of the next step."""

    def make_room(self, groups: Sequence[Group]) -> None:
        """Have all that it remembers of a step, before there was one."""

    def to_add_up(
        self, groups: Sequence[Group], measured: Sequence[Measured], processes: Processes
    ) -> Sequence[Tensor]:
        """What to add up over the processes for `observe`, where parameters are sharded."""

    def observe(
        self, groups: Sequence[Group], measured: Sequence[Measured], totals: Sequence[Tensor] = ()
    ) -> Tensor | None:
        """Take in a step before it is taken, and return the 0-d factor of its learning rates; None for none.

        Args:
            groups: the optimizer's.
            measured: what the first pass found in those that take a step.
            totals: the sums of what `to_add_up` gave.
        """

    def multiplier(self) -> Tensor | None:
        """What `observe` returned last, or would return at a first step."""

    def follow(self, groups: Sequence[Group], measured: Sequence[Measured], watched: Sequence[Watched]) -> None:
        """Take in the step that was taken."""

    def scaled(self, mask: Tensor) -> Tensor:
        """A learning-rate mask as the next step would use it."""

    def summary(self) -> dict[str, Tensor]:
        """What to show of it, 0-d tensors by name, while still on the device."""

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""

    def load(self, saved: Mapping[str, Any] | None) -> None:
        """Take over what `memory.check` found right, or start afresh."""

    def difference(self, has_context: bool, has_momenta: bool) -> str:
        """What becomes of a checkpoint's context, for a log line; "" if all of it is taken over."""


class NoContext:
    """The driver of the plain optimizers.

    Args:
        config: the optimizer's options, of which none matters here.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        pass

    def periods(self, config: OptimizerConfig) -> tuple[int, ...]:
        return ()

    def check_group(self, number: int, config: OptimizerConfig, shared: OptimizerConfig) -> None:
        pass

    def groups_changed(self, groups: Sequence[Group]) -> None:
        pass

    def watch_every(self, groups: Sequence[Group]) -> int:
        return 0

    def watch_places(self, groups: Sequence[Group]) -> Sequence[int]:
        return ()

    def report_loss(self, loss: Tensor | float) -> None:
        pass

    def make_room(self, groups: Sequence[Group]) -> None:
        pass

    def to_add_up(
        self, groups: Sequence[Group], measured: Sequence[Measured], processes: Processes
    ) -> Sequence[Tensor]:
        return ()

    def observe(self, groups: Sequence[Group], measured: Sequence[Measured], totals: Sequence[Tensor] = ()) -> None:
        return None

    def multiplier(self) -> None:
        return None

    def follow(self, groups: Sequence[Group], measured: Sequence[Measured], watched: Sequence[Watched]) -> None:
        pass

    def scaled(self, mask: Tensor) -> Tensor:
        return mask

    def summary(self) -> dict[str, Tensor]:
        return {}

    def saved(self) -> dict[str, Any]:
        return {}

    def load(self, saved: Mapping[str, Any] | None) -> None:
        pass

    def difference(self, has_context: bool, has_momenta: bool) -> str:
        if has_context or has_momenta:
            return "its context and its multi-scale momenta are freed: this optimizer has none"
        return ""


class Context:
    """The driver of the contextual optimizers.

    Args:
        config: the optimizer's options.

    Attributes:
        module: the context, which everybody may read.
    """

    # How the multiplier follows the alignment of the steps.
    law: Law = STANDARD_LAW

    def __init__(self, config: OptimizerConfig) -> None:
        self.module = ContextualOptimizationModule(
            config.context_window, config.edge_threshold, config.adaptation_rate, self.law
        )
        self._losses: list[Tensor | float] = []  # reported since the last step
        self._deciders = _Deciders()
        self._sampler: Sampler | None = None
        self._processes: Processes = Alone()
        # This process's part of the samples of the last step, where parameters are sharded: what follows from them
        # waits for the first message of the next step.
        self._waiting: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sampler": None, "_processes": Alone()}

    def periods(self, config: OptimizerConfig) -> tuple[int, ...]:
        return config.momentum_scales

    def check_group(self, number: int, config: OptimizerConfig, shared: OptimizerConfig) -> None:
        for name in _SHARED:
            value, allowed = getattr(config, name), getattr(shared, name)
            if value != allowed:
                raise ValueError(
                    f"parameter group {number}: option '{name}' is {value!r}; there is one context for the whole "
                    f"optimizer, so a group cannot have its own; allowed: {allowed!r}, as the constructor has it"
                )

    def groups_changed(self, groups: Sequence[Group]) -> None:
        self._sampler = None
        if groups:
            _set_bounds(self.module, groups)

    def watch_every(self, groups: Sequence[Group]) -> int:
        return self._sampler_of(groups).every

    def watch_places(self, groups: Sequence[Group]) -> Sequence[int]:
        return self._sampler_of(groups).starts

    def report_loss(self, loss: Tensor | float) -> None:
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().float().mean())
        elif isinstance(loss, Real) and not isinstance(loss, bool):
            self._losses.append(float(loss))
        else:
            raise TypeError(f"the loss is {loss!r}; allowed: a number or a tensor")

    def make_room(self, groups: Sequence[Group]) -> None:
        device = next(p.device for group in groups for p in group.params)
        self.module.make_room(self._sampler_of(groups).size, device)

    def to_add_up(
        self, groups: Sequence[Group], measured: Sequence[Measured], processes: Processes
    ) -> Sequence[Tensor]:
        self._processes = processes
        if not measured or not processes.shards:
            return ()
        gradient = self._gathered(groups, measured, [piece for group in measured for piece in group.watched])
        report = report_of(*_loss_and_unusable(self._losses, measured, gradient.device), gradient.device)
        return [report, gradient, *(self._waiting or ())]

    def observe(
        self, groups: Sequence[Group], measured: Sequence[Measured], totals: Sequence[Tensor] = ()
    ) -> Tensor | None:
        lr = max(float(group.entry["lr"]) for group in groups)
        _set_bounds(self.module, groups)
        if not measured:
            self._losses = []  # They belong to this step even if it has no gradient.
            return None
        if totals:
            report, gradient, *samples = (total.float() for total in totals)
            if samples:
                self.module.follow(samples[0], samples[1], of_all=True)
            self._losses, self._waiting = [], None
            return self.module.take_in(gradient, report / self._processes.count(), lr)
        gradient = self._gathered(groups, measured, [piece for group in measured for piece in group.watched])
        loss, unusable = _loss_and_unusable(self._losses, measured, gradient.device)
        self._losses = []
        return self._deciders.decide(
            self.module, measured, lambda kernels: self.module.update_context(gradient, loss, lr, unusable, kernels)
        )

    def multiplier(self) -> Tensor:
        return self.module.multiplier()

    def follow(self, groups: Sequence[Group], measured: Sequence[Measured], watched: Sequence[Watched]) -> None:
        if not watched:
            return
        grads, changes = (self._gathered(groups, measured, pieces) for pieces in zip(*watched))
        if self._processes.shards:
            self._waiting = grads, changes
        else:
            self._deciders.decide(
                self.module, measured, lambda kernels: self.module.follow(grads, changes, kernels=kernels)
            )

    def scaled(self, mask: Tensor) -> Tensor:
        return mask * self.module.multiplier().to(mask.device)

    def summary(self) -> dict[str, Tensor]:
        return self.module.summary()

    def saved(self) -> dict[str, Any]:
        if self._waiting is not None:
            scaled_grad, change = self._processes.add_up(self._waiting)
            self.module.follow(scaled_grad, change, of_all=True)
            self._waiting = None
        return self.module.state_dict()

    def load(self, saved: Mapping[str, Any] | None) -> None:
        # Both are of steps that the checkpoint knows nothing of.
        self._losses = []
        self._waiting = None
        self.module.load_state_dict(saved)

    def difference(self, has_context: bool, has_momenta: bool) -> str:
        if has_context:
            return ""
        if has_momenta:  # torch.distributed.checkpoint's flat layout drops the context; or its group was dropped.
            return "it has momenta but no context: multiplier and histories start fresh"
        return "it is of an optimizer without context: multiplier, histories and momenta start fresh"

    def _gathered(self, groups: Sequence[Group], measured: Sequence[Measured], pieces: Sequence[Tensor]) -> Tensor:
        """The sample that pieces of all stacks make up; of shards this process's part of it, with 0 elsewhere."""
        stacks = [stack for group in measured for stack in group.stacks]
        sampler = self._sampler_of(groups)
        if self._processes.shards:
            pieces = [sampler.part_of(stack, piece) for stack, piece in zip(stacks, pieces)]
        # An element that several processes have is of one of them, so that their sum is exact in any order.
        own = [added_by(self._processes, stack.cut, piece) for stack, piece in zip(stacks, pieces)]
        return sampler.gather(stacks, own)

    def _sampler_of(self, groups: Sequence[Group]) -> Sampler:
        if self._sampler is None:
            self._sampler = Sampler([p.numel() for group in groups for p in group.params])
        return self._sampler


def _set_bounds(module: ContextualOptimizationModule, groups: Sequence[Group]) -> None:
    largest = max(group.initial_lr for group in groups)
    module.set_bounds(largest, max(group.config.max_lr for group in groups))


class _Deciders:
    """Who decides: kernels where the first group's gradients were measured by some, until they fail here."""

    def __init__(self) -> None:
        self._failed = False

    def decide(
        self,
        module: ContextualOptimizationModule,
        measured: Sequence[Measured],
        decision: Callable[[Deciding | None], _Decision],
    ) -> _Decision:
        """What `decision` comes to by kernels, or by operations of PyTorch, for which it gets None."""
        first = measured[0]
        if not self._failed and (first.by_numba or first.launcher is not None):
            try:
                return attempted(module, lambda: decision(_kernels(first)))
            except Exception as error:  # Compiling can fail in any way.
                self._failed = True
                logger.warning(
                    "fused: the kernels of the context do not work here, PyTorch's operations go on without them: %s",
                    f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                )
        return decision(None)


def _kernels(measured: Measured) -> Deciding:
    """What decides in place of PyTorch's operations, where kernels measured a group."""
    if measured.launcher is not None:
        from . import gpu  # It needs Triton.

        return gpu.ContextKernels(measured.launcher)
    from . import cpu  # It needs numba.

    return cpu.Numbers()


def _loss_and_unusable(
    losses: Sequence[Tensor | float], measured: Sequence[Measured], device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """The mean of the losses that were reported, if any, and how many gradient elements are unusable."""
    counts = [count.to(device) for group in measured for count in group.unusable]
    unusable = torch.stack(counts).sum() if len(counts) > 1 else counts[0]
    known = [as_scalar(loss, device) for loss in losses]
    return torch.stack(known).mean() if len(known) > 1 else known[0] if known else None, unusable

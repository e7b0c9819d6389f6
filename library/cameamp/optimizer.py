"""The one optimizer: its groups, a step from top to bottom in `step`, the rates to read, saving and loading."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import sharding, states_only
from .checkpoint.load import restore
from .checkpoint.save import complete
from .config import OptimizerConfig
from .context.driver import Driver, NoContext
from .groups import MAGNITUDES, Group, GroupOptions
from .one_by_one import OneByOne, Parts
from .parameters import Parameters, check_parameters, names_of
from .readings import HasReadings
from .states import THIRTY_TWO_BITS, Precision
from .step import measure
from .step.engine import Engine
from .step.rules import ALL_TECHNIQUES, Techniques

logger = logging.getLogger(__name__)

# What is saved when an optimizer is copied or pickled; the rest is made anew.
_OWN = ("config", "_groups", "_parameters", "_driver", "_unusable")


class CameAMP(HasReadings, Optimizer):
    """The engine of the Automagic_CameAMP family; use one of its four classes.

    Args:
        params: parameters or parameter groups, as for every torch optimizer. A group may set any option for itself.
        config: all options at once; or
        options: the fields of `OptimizerConfig`, by name.

    Raises:
        TypeError: an unknown option, a value of the wrong type, or options beside `config`.
        ValueError: a value out of range.
    """

    # What distinguishes the classes of the family from one another, and from ablations.
    _precision: Precision = THIRTY_TWO_BITS
    _techniques: Techniques = ALL_TECHNIQUES
    _driver_class: type[Driver] = NoContext

    def __init__(self, params: Any, config: OptimizerConfig | None = None, **options: Any) -> None:
        if config is None:
            config = OptimizerConfig.from_options(options)
        elif not isinstance(config, OptimizerConfig):
            raise TypeError(f"config is {config!r}; allowed: an OptimizerConfig")
        elif options:
            raise TypeError(f"give either config or options, not both; got config and {', '.join(options)}")
        self.config = config
        self._groups: list[Group] = []
        self._parameters = Parameters()
        self._driver = self._driver_class(config)
        self._unusable: dict[torch.device, Tensor] = {}  # one tally a device: adding them up would read back
        self._begin()
        super().__init__(params, config.as_dict() | {"lr": options.get("lr", config.lr)})

    def _begin(self) -> None:
        """Make what is neither copied nor saved."""
        self._engine = Engine()
        self._one_by_one = OneByOne()
        self._forget(states=True)

    # Groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it does not set are the constructor's.

        Raises:
            TypeError, ValueError: as the constructor does, with the group's number. Nothing is added then.
        """
        number = len(self._groups)
        options = GroupOptions.of(param_group, number, self.config)
        self._driver.check_group(number, options.config, self.config)
        super().add_param_group(param_group)
        entry = self.param_groups[-1]
        try:
            check_parameters(entry["params"], entry.get("param_names", ()))
        except ValueError as error:
            self.param_groups.pop()
            raise ValueError(f"parameter group {number}: {error}") from None
        if isinstance(entry["lr"], Tensor) and any(entry["lr"] is other["lr"] for other in self.param_groups[:-1]):
            entry["lr"] = entry["lr"].clone()  # Schedulers write into it, group after group.
        entry["max_lr"] = options.config.max_lr
        periods = self._driver.periods(options.config)
        self._groups.append(Group(number, entry, options, self._parameters, self._precision, periods))
        self._forget()

    def set_parameter_names(self, names: Mapping[Tensor, str]) -> None:
        """Name parameters, so that LoRA factors can be recognized; parameters of other optimizers are ignored."""
        for group in self._current_groups():
            group.names = [names.get(p, known) for p, known in zip(group.params, group.names)]
        self._forget()

    def _unchanged_groups(self) -> list[Group]:
        """The current groups, which must be those that were added."""
        groups = self._current_groups()
        count, known = sum(len(group.params) for group in groups), len(self._parameters)
        if len(self.param_groups) != len(groups) or (known and count != known):
            raise RuntimeError("param_groups was changed by hand; add groups by add_param_group, and remove none")
        if not known:
            sharding.check_shards((group.params, group.shapes) for group in groups)
        return groups

    def _current_groups(self) -> list[Group]:
        """The groups, each with its current dictionary: a trainer may have replaced the list `param_groups`."""
        for group, entry in zip(self._groups, self.param_groups):
            group.entry = entry
        return self._groups

    def _groups_with_states(self) -> list[Group]:
        """The current groups; their parameters are located first if any parameter has a state."""
        groups = self._current_groups()
        if any("step" in state for state in self.state.values()):
            self._parameters.locate(groups)
        return groups

    def _forget(self, states: bool = False) -> None:
        """Drop what is cached about the parameters; with `states` also about their states, which may be new now."""
        self._engine.forget()
        self._parameters.forget(log_again=states)
        groups = self._current_groups() if self._groups else []
        self._driver.groups_changed(groups)
        if states:
            for group in groups:
                group.restart()

    # The step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        After `step_parameter` it takes the parameters with a gradient that were not stepped, and ends the step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a sparse or complex gradient, or a parameter that is sharded in another way than FSDP2
                shards it; before any parameter or state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None:
                self._driver.report_loss(loss)
        groups = self._unchanged_groups()
        if self._one_by_one.is_under_way:
            self._one_by_one.finish(self._parts(groups), take_rest=True)
            return loss
        active = [measure.with_gradient(group.params) for group in groups]
        if not self.state and not any(active):
            measure.warn_of_none(p for group in groups for p in group.params)
        if any(active):
            self._parameters.locate(groups)
            for group in groups:
                group.entry.pop(MAGNITUDES, None)  # This is no step that is taken one by one.
        processes, watch_every = self._parameters.processes, self._driver.watch_every(groups)
        only_states = not self.state and states_only.is_asked_for(self.param_groups, active, processes)
        stacks = []
        for group, params in zip(groups, active):
            group.count_step(params, self.state)
            stacks.append(group.stacks(params, self.state) if params else [])
        if only_states:
            states_only.make(groups, stacks, self.state, self._driver)
            return loss
        taking = [(group, own) for group, own in zip(groups, stacks) if own]
        watched_at = watch_every, self._driver.watch_places(groups)
        step = self._engine.begin_step(taking, self.state, *watched_at, self._techniques, processes)
        measured = [step.measure(group, own) for group, own in taking]
        for found in measured:
            measure.tally(self._unusable, found.unusable)
        measured, totals = step.add_up(measured, self._driver.to_add_up(groups, measured, processes))
        multiplier = self._driver.observe(groups, measured, totals)
        measured = step.ask(measured, multiplier)
        watched = [seen for found in measured for seen in step.update(found, multiplier)]
        self._driver.follow(groups, measured, watched)
        return loss

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: Mapping[str, Any], index: int | None = None) -> None:
        """Take the step of one parameter, so that its gradient can be freed; for hooks of the backward pass.

        There, on a CPU, `p.grad` is None afterwards, and the step is taken before the backward pass ends, together
        with others. Elsewhere it is taken at once, and the gradient is the caller's to free. `step()` then ends
        the step; where a trainer does not call it, the next `report_loss` or the next step of a parameter does. What
        belongs to all gradients of a group is of the step before, see `one_by_one`. Neither clipping by the global
        norm nor GradScaler works so.

        Args:
            p: the parameter; without a gradient it is left alone.
            group: its entry of `param_groups`.
            index: its place there; not needed.

        Raises:
            ValueError: `p` is not a parameter of this group.
            RuntimeError: as of `step`, or the parameter is sharded.
        """
        groups = self._unchanged_groups()
        self._parameters.locate(groups)
        self._one_by_one.take(p, group, index, self._parts(groups))

    step_param = step_parameter  # Some trainers call it so.

    def _parts(self, groups: list[Group]) -> Parts:
        return Parts(groups, self._parameters, self.state, self._driver, self._engine, self._techniques, self._unusable)

    def _finish_what_is_under_way(self) -> None:
        if self._one_by_one.is_under_way:
            with torch.no_grad():
                self._one_by_one.finish(self._parts(self._current_groups()))

    def report_loss(self, loss: Tensor | float) -> None:
        """Report the loss that the gradients of the next step come from. Optimizers without a context ignore it.

        Several reports before one step, as with gradient accumulation, are averaged, and in a distributed run so are
        the ranks. A tensor stays on its device; nothing is read back.

        Args:
            loss: a number or a tensor; if it has several elements, their mean counts.

        Raises:
            TypeError: it is neither.
        """
        self._finish_what_is_under_way()  # The loss is of the next step.
        self._driver.report_loss(loss)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, and the derived values that readers of a checkpoint expect.

        Returns:
            torch's layout with `magic_version` added; only tensors, numbers, strings, None, lists, tuples, dicts.
        """
        self._finish_what_is_under_way()
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            saved = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks  # They run below, on the completed checkpoint.
        saved = complete(saved, self._groups_with_states(), self.state, names_of(self._groups), self._driver)
        for post_hook in hooks.values():
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a checkpoint. `lr` and `initial_lr` come from it, every other option stays the constructor's.

        What schedulers and trainers have added to the groups is restored too.

        Unlike torch's own, every state keeps its dtype: torch would cast it to the parameter's, and a learning-rate
        mask in bfloat16 would stop changing.

        Raises:
            ValueError: the checkpoint does not fit; it says which parameter and why. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = self._current_groups()
        restored = restore(state_dict, groups, names_of(groups), self._driver)
        for note in restored.notes:
            logger.info("checkpoint: %s", note)
        for group, entries, (uncoded, reason) in zip(groups, restored.entries, restored.uncoded):
            group.restore(entries)
            if uncoded:
                group.leave_uncoded(uncoded, restored.state, reason)
        self._driver.load(restored.context)
        self.__setstate__({"state": defaultdict(dict, restored.state), "param_groups": self.param_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._finish_what_is_under_way()
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_engine" not in self.__dict__:
            self._begin()
        self._one_by_one.forget()
        self._forget(states=True)

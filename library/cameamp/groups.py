"""A parameter group: its options, its schedule, its stacks and their states."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .config import OPTION_NAMES, OptimizerConfig, checked
from .options import check_group_names
from .parameters import Parameters
from .phase import Phase
from .sharding import WHOLE, Cut
from .stacks.layout import Layout, Singles
from .stacks.stack import Binding, ParameterState, Stack, Traits
from .states import LR_MASK, TABLE, Precision, State, momentum, to_full, uncoded
from .storage import Format, Spread
from .storage.full import Full
from .storage.shards import Place
from .storage.trial import can_store
from .techniques import allora, multiscale

logger = logging.getLogger(__name__)

# The entry of a group's dictionary that holds what was measured of all its gradients in the step before, if that was
# taken one by one: sum, count of elements other than 0, mean and variance of |g|, (4,) float32.
MAGNITUDES = "gradient_magnitudes"

# Per-parameter states, as `optimizer.state` is; groups add to them.
States = MutableMapping[Tensor, ParameterState]


@dataclass(frozen=True)
class GroupOptions:
    """What a group was built with; schedulers may write into the group's dictionary, but not in here.

    Attributes:
        config: the group's options; its max_lr is raised to `lr` where that is higher.
        lr: the group's learning rate; unlike config.lr it may be 0, which freezes the group.
    """

    config: OptimizerConfig
    lr: float

    @classmethod
    def of(cls, param_group: Mapping[str, Any], number: int, defaults: OptimizerConfig) -> GroupOptions:
        """The options that a group sets, and the defaults of the others.

        Args:
            param_group: the group as the user gave it.
            number: its number, for messages.
            defaults: the constructor's options.

        Raises:
            TypeError, ValueError: as of `OptimizerConfig`, with the group's number.
        """
        try:
            if not isinstance(param_group, dict):
                raise TypeError(f"it is a {type(param_group).__name__}; allowed: a dictionary with 'params'")
            check_group_names(param_group, OPTION_NAMES)
            given = {name: param_group[name] for name in OPTION_NAMES if name in param_group}
            if "lr" not in given:
                config = defaults.replace(**given)
                return cls(config, config.lr)
            lr, lowest = checked("lr", given.pop("lr")), checked("min_lr", given.get("min_lr", defaults.min_lr))
            config = defaults.replace(**given, lr=lowest)
            if lr == 0:
                return cls(config, 0.0)
            if lr > config.max_lr:
                # Mostly a rate left over from another optimizer, which would ruin the run.
                logger.warning(
                    "parameter group %d: max_lr is raised from %g to the group's lr, %g", number, config.max_lr, lr
                )
                config = config.replace(max_lr=lr)
            return cls(config.replace(lr=lr), lr)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter group {number}: {error}") from None


class Group:
    """One entry of an optimizer's `param_groups`.

    Args:
        number: its place in `param_groups`.
        entry: its dictionary there, into which schedulers write.
        options: what it was built with.
        parameters: those of the whole optimizer.
        precision: which states are coded.
        periods: those of its multi-scale momenta.

    Attributes:
        names: the names of its parameters; "" for one that is not known.
        shapes: the shapes of the parameters that it was built with.
        apart: whether each parameter's states are kept by themselves, because its steps are taken one by one.
    """

    def __init__(
        self,
        number: int,
        entry: dict[str, Any],
        options: GroupOptions,
        parameters: Parameters,
        precision: Precision,
        periods: tuple[int, ...],
    ) -> None:
        self.number = number
        self.entry = entry
        self.config = options.config
        self.periods = periods
        self.names: list[str] = [*entry.get("param_names", [""] * len(entry["params"]))]
        self.shapes = [p.shape for p in entry["params"]]
        self._lr = options.lr
        self._parameters = parameters
        self.precision = precision
        self._momenta = [momentum(period) for period in periods]
        # Parameters whose states stay in 32 bits because their device failed to code them.
        self.uncoded: set[Tensor] = set()
        self.apart = False
        self.restart()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_layout", "_bindings", "_known_places")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.restart()

    def restart(self, apart: bool = False) -> None:
        """Drop everything built on the states so far; they may be other tensors now. `apart` holds from here on."""
        self.apart = self.apart or apart
        # Multi-scale momenta add two dozen passes over a stack, so it pays to have it in the caches. If all states are
        # coded, coding takes most of the time and it makes no difference.
        cached = bool(self.periods) and not self.precision.codes_all
        self._layout: Layout | Singles = Singles() if self.apart else Layout(cached)
        self._bindings: dict[tuple[Any, ...], dict[str, Binding]] = {}
        self._places = _Places()

    # Options and rates ------------------------------------------------------------------------------------------

    @property
    def params(self) -> list[Tensor]:
        """Its parameters."""
        params: list[Tensor] = self.entry["params"]
        return params

    @property
    def initial_lr(self) -> float:
        """The learning rate that a scheduler multiplies."""
        return float(self.entry.get("initial_lr", self._lr))

    @property
    def starting_lr(self) -> float:
        """The value at which the learning-rate mask starts."""
        return min(max(self.initial_lr, self.config.min_lr), self.config.max_lr)

    @property
    def scheduler_factor(self) -> float:
        """By how much a scheduler has changed the learning rate since the start."""
        lr, initial = float(self.entry["lr"]), self.initial_lr
        if lr == 0:
            return 0.0
        # A group built with lr 0 and given a rate later is thawed: there is no ratio, so its mask alone decides.
        return lr / initial if initial != 0 else 1.0

    def restore(self, entries: Mapping[str, Any]) -> None:
        """Set entries of its dictionary; `lr` and `initial_lr` stay the same tensors if they are tensors."""
        for name, value in entries.items():
            if name in ("lr", "initial_lr") and isinstance(self.entry.get(name), Tensor):
                self.entry[name].fill_(value)
            else:
                self.entry[name] = value

    # States -----------------------------------------------------------------------------------------------------

    def states(self, phase: Phase) -> list[State]:
        """The rows of the table that its parameters have in a phase."""
        return [state for state in TABLE if state.lives(phase, self.config.came)] + self._momenta

    def format(self, state: State, p: Tensor) -> Format:
        """How a state of one of its parameters is stored."""
        cut = self._parameters.cut(p)
        place = None if cut is WHOLE else Place(cut.rows(p.shape)[0], cut.most_rows(p.shape))
        code = self.precision.format(state, p.shape, self.config, place)
        return uncoded(state, code) if p in self.uncoded else code

    def phase(self, stack: Stack) -> Phase:
        """The phase of a stack's step."""
        return Phase.at(stack.traits.step, self.config.warmup_steps)

    def count_step(self, params: Iterable[Tensor], states: States) -> None:
        """Count a step of some of its parameters, and the updates of their momenta."""
        own = [states[p] for p in params]
        before = [state.get("step", 0) for state in own]
        if 0 in before:  # States made without a step have room for signs, and no signs.
            for state in own:
                if state.get("step") == 0:
                    for key in ("last_polarity", "last_polarity_q"):
                        state.pop(key, None)
        different = set(before)  # usually all are at one step
        for step in different:
            alike = own if len(different) == 1 else [state for state, n in zip(own, before) if n == step]
            for state in alike:
                state["step"] = step + 1
            for row, period in zip(self._momenta, self.periods):
                counter, is_due = row.counter, multiscale.is_due(period, step + 1)
                for state in alike:
                    count = state.setdefault(counter, 0)
                    if is_due:
                        state[counter] = count + 1

    def stacks(self, params: Sequence[Tensor], states: States) -> list[Stack]:
        """The stacks of some of its parameters, which have taken a step."""
        own = [states[p] for p in params]
        positions, scaled, cuts = self._places.of(params, self._parameters, self.config.full_finetune)
        kinds = list(
            zip(
                [state["step"] for state in own],
                scaled,
                ["last_polarity" in state or "last_polarity_q" in state for state in own],
                zip(*(map(dict.get, own, repeat(row.counter), repeat(0)) for row in self._momenta))
                if self._momenta
                else repeat(()),
                cuts,
            )
        )
        alike = {kind: Traits(*kind) for kind in set(kinds)}  # usually there are one or two in a group
        members = list(zip(positions, params, [alike[kind] for kind in kinds]))
        stacks, left_behind = self._layout.stacks(members)
        for p in left_behind:
            # Its states are slices of a whole stack's tensors, which would stay allocated for this parameter alone.
            states[p].update((key, value.clone()) for key, value in states[p].items() if torch.is_tensor(value))
        return stacks

    def stacks_with_states(self, states: States) -> list[Stack]:
        """The stacks of all its parameters that have ever taken a step."""
        params = [p for p in self.params if "step" in states.get(p, {})]
        return self.stacks(params, states) if params else []

    def bind(self, stack: Stack, states: States, reading: bool = False) -> None:
        """Bind a stack to the states of its phase; in 32 bits if its device cannot code them.

        Args:
            stack: one of the group's.
            states: the optimizer's.
            reading: do not create `last_polarity` if it does not exist; only a step may begin it.
        """
        bindings = self._bindings_of(stack, reading)
        if stack.is_bound(states, bindings, thorough=reading):
            return
        try:
            stack.bind(states, bindings, self.starting_lr)
        except RuntimeError as error:
            formats = [self.format(row, stack.params[0]) for row in self.states(self.phase(stack))]
            coded = [each for each in formats if not isinstance(each, Full)]
            if not coded or can_store(coded, stack.params[0].shape, stack.device, error):
                raise
            self.leave_uncoded(stack.params, states, str(error))
            stack.bind(states, self._bindings_of(stack, reading), self.starting_lr)

    def leave_uncoded(self, params: Collection[Tensor], states: States, reason: str) -> None:
        """Store the states of some parameters in 32 bits from here on, with one warning."""
        reason = reason.partition("\n")[0]
        shapes = ", ".join(sorted({str(tuple(p.shape)) for p in params}))
        logger.warning("states of parameters of shape %s stay in 32 bits, quantizing failed: %s", shapes, reason)
        for p in params:
            for row in (*TABLE, *self._momenta):
                code = self.format(row, p)
                if row.name not in states[p] and all(key in states[p] for key in code.keys(row.name)):
                    states[p][row.name] = _decoded(row, code, p, self._parameters.cut(p), states[p])
        self.uncoded.update(params)

    def lr_mask(self, p: Tensor, states: States) -> Tensor:
        """The mask of one of its parameters, a copy, cut as it is; before its first step, what that will start from."""
        state = states.get(p, {})
        if "step" in state:
            return _decoded(LR_MASK, self.format(LR_MASK, p), p, self._parameters.cut(p), state)
        return torch.full_like(p.detach(), self.starting_lr, dtype=torch.float32)

    def mask_and_row_scaling(self, stack: Stack, states: States) -> tuple[Tensor, Tensor | None]:
        """The masks of a stack, (tensors, rows, columns), and ALLoRA's factors, (tensors, rows, 1), if it applies."""
        self.bind(stack, states, reading=True)
        rows = allora.row_scaling(stack.weights(), self.config.eta) if stack.traits.row_scaled else None
        return stack.read(LR_MASK.name), rows

    def _bindings_of(self, stack: Stack, reading: bool) -> dict[str, Binding]:
        """How a stack stores each state of its phase; cached, because it stays the same for hundreds of steps."""
        phase = self.phase(stack)
        if reading and not stack.traits.has_polarity:
            phase = phase._replace(warmup=False)
        p = stack.params[0]
        kind = (phase, p.shape, p in self.uncoded, stack.cut)
        if kind not in self._bindings:
            if self.config.factored and stack.cut is not WHOLE and not self._bindings:
                logger.warning(
                    "parameter group %d: factored: sharded parameters keep their states in full", self.number
                )
            found = {}
            for row in self.states(phase):
                code = self.format(row, p)
                found[row.name] = Binding(code, code.keys(row.name), row.starts_at_lr)
            self._bindings[kind] = found
        return self._bindings[kind]


def _decoded(row: State, code: Format, p: Tensor, cut: Cut, state: ParameterState) -> Tensor:
    """A state of a parameter in float32 (or bool), a copy, cut as the parameter is."""
    here = {key: cut.local([state[key]])[0] for key in code.keys(row.name)}
    shape = torch.Size((cut.rows(p.shape)[1], *p.shape[1:])) if p.ndim else p.shape
    return cut.wrapped([to_full(row, here, code, shape)], Spread.BY_ROW, p.shape[0] if p.ndim else 1)[0]


class _Places:
    """What does not change of some parameters while nobody forgets them; usually the same ones come again."""

    def __init__(self) -> None:
        self._located: object = None
        self._params: list[Tensor] = []
        self._found: tuple[list[int], list[bool], list[Cut]] = [], [], []

    def of(
        self, params: Sequence[Tensor], parameters: Parameters, full_finetune: bool
    ) -> tuple[list[int], list[bool], list[Cut]]:
        """For each its number in the optimizer, whether ALLoRA applies to it, and which part of it is here."""
        same = self._located is parameters.located and len(self._params) == len(params)
        if not same or not all(map(is_, self._params, params)):
            factors = set() if full_finetune else parameters.factors
            self._located, self._params = parameters.located, list(params)
            self._found = (
                [parameters.position(p) for p in params],
                [p in factors for p in params],
                [parameters.cut(p) for p in params],
            )
        return self._found

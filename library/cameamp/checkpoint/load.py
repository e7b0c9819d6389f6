"""Reading a checkpoint: check all of it, convert what can be, and only then hand it over."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checksum import checksum
from ..config import OPTION_NAMES, OptimizerConfig
from ..context import memory
from ..context.driver import Driver
from ..groups import MAGNITUDES, Group
from ..phase import Phase
from ..rounding import Dither
from ..sharding import WHOLE, Processes, cut_of, is_sharded, processes_of, totals_of
from ..states import DERIVED, MOMENTUM_PREFIX, TABLE, THIRTY_TWO_BITS, State, in_format, momentum, to_full, uncoded
from ..storage import Format
from ..storage.low_rank_shards import LowRankOfShard
from ..storage.shards import FullOfShard, ShardAverageFormat, ShardFormat, StoredShardAverage, saved_format
from ..storage.trial import can_store
from . import older_layout, sharded
from .layout import CHECKSUMS, OWN_ENTRIES, VERSION, group_checksum, labels_of

_DAMAGED = "damaged or edited after it was saved"


@dataclass
class Restored:
    """What a checkpoint gives an optimizer.

    Attributes:
        state: the new state of each parameter that has one.
        entries: for each group, `lr`, `initial_lr`, and what schedulers and trainers have added.
        context: what the context is to take over; None if the checkpoint has none.
        notes: what differs from the checkpoint, a log line each.
        uncoded: for each group, the parameters whose states could not be coded, and why.
    """

    state: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    context: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    uncoded: list[tuple[set[Tensor], str]] = field(default_factory=list)


def restore(saved: Mapping[str, Any], groups: Sequence[Group], names: Mapping[Tensor, str], driver: Driver) -> Restored:
    """Check a checkpoint against an optimizer, and convert it.

    If parameters are sharded, all processes do this together, and all refuse a checkpoint that one of them refuses.

    Args:
        saved: what `state_dict()` returned. `magic_version` may be missing: torch.distributed.checkpoint drops it.
        groups: the optimizer's parameter groups.
        names: parameter names, if they are known, for error messages.
        driver: what drives the optimizer's learning rates.

    Returns:
        The new states, complete, and on their parameters' devices. No argument is changed.

    Raises:
        ValueError: what does not fit, with the parameter's number, shape and name.
    """
    processes = processes_of(p for group in groups for p in group.params)
    checks = _Checksums(processes)
    restored = Restored()
    error: Exception | None = None
    pending: list[_Pending] = []
    try:
        pending = _read(saved, groups, names, driver, restored, checks)
    except Exception as found:  # Whatever it is, the other processes must not wait for this one.
        error = found
    if processes.shards:
        (failed,) = processes.add_up([torch.tensor([float(error is not None)], device=_device(groups))])
        if failed.item() > 0 and error is None:
            error = ValueError("another process refused its part of the checkpoint, and says why")
    if error is not None:
        raise error
    checks.compare()
    if pending:
        for each, tensors in zip(pending, _follow_together(pending, processes)):
            restored.state[each.part.p] |= tensors
    return restored


def _read(
    saved: Mapping[str, Any],
    groups: Sequence[Group],
    names: Mapping[Tensor, str],
    driver: Driver,
    restored: Restored,
    checks: _Checksums,
) -> list[_Pending]:
    """As `restore`, without the other processes: into `restored`, and with what is left to compare in `checks`.

    Returns:
        What is left to make together.
    """
    _check_top_level(saved, groups)
    labels = labels_of(groups, names)
    if older_layout.is_written_in(saved):
        saved = older_layout.converted(saved, [group.params for group in groups], labels)
        restored.notes.append(older_layout.NOTE)
        carries_checksums = False
    else:
        _check_version(saved)
        carries_checksums = _check_groups(saved, groups, labels)
        if not carries_checksums and saved["state"]:
            restored.notes.append("it carries no checksums, so damage to it would not be seen")
    restored.notes += _check_names(saved["param_groups"], groups, names, labels)
    states, pieces = _without_context(saved["state"])
    context = _context(pieces or saved["param_groups"])
    outdated = context is not None and memory.is_of_an_older_law(context)
    restored.context = None if outdated else context
    has_momenta = context is not None or _holds_momenta(states)
    changes = _Changes()
    if states:
        changes.context = driver.difference(context is not None, has_momenta)
        if outdated and not changes.context:
            changes.context = "its multiplier followed another law: multiplier and histories start fresh"
    differences: list[str] = []
    checks.owners = _owners(saved["param_groups"], groups, labels) if carries_checksums else {}
    seen = set()
    position = 0
    pending: list[_Pending] = []
    for group, saved_group in zip(groups, saved["param_groups"]):
        added = {name: copy.deepcopy(value) for name, value in saved_group.items() if name not in OWN_ENTRIES}
        rates, magnitudes = _learning_rates(group.number, saved_group), _magnitudes(group.number, saved_group)
        restored.entries.append({**added, **rates, **magnitudes})
        differences += _option_differences(group.number, saved_group, group.config)
        reader = _Reader(group, saved_group, has_momenta, changes)
        checksums = saved_group["state_checksums"] if carries_checksums else [None] * len(group.params)
        for p, key, expected in zip(group.params, saved_group["params"], checksums):
            seen.add(key)
            has_state = key in states and (not isinstance(states[key], Mapping) or len(states[key]) > 0)
            try:
                if carries_checksums and has_state != (expected is not None):
                    raise ValueError("its state is missing" if expected else "it was saved without the state it has")
                if has_state:
                    saved_state = reader.without_leftovers(states[key])
                    restored.state[p] = reader.read(saved_state, p, position)
                    if carries_checksums:
                        checks.add(saved_state, expected, labels[p])
            except ValueError as error:
                raise ValueError(f"{labels[p]}: {error}") from None
            position += 1
        restored.uncoded.append((reader.uncoded, reader.reason))
        pending += reader.pending
    unknown = [key for key in states if key not in seen]
    if unknown:
        raise ValueError(f"the checkpoint has states of parameters that no group lists: {unknown[:5]}")
    if any(changes.__dict__.values()):
        restored.notes.append(changes.describe())
    if differences:
        restored.notes.append(
            "options differ from the checkpoint's; the constructor's are used: " + "; ".join(differences)
        )
    return pending


def _device(groups: Sequence[Group]) -> torch.device:
    return next(p.device for group in groups for p in group.params)


def _without_context(states: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The saved states without pieces of a context, and the context if one of them carries it."""
    rest, found = dict(states), []
    for key, state in states.items():
        if isinstance(state, Mapping):
            rest[key], context = sharded.put_together(state)
            found += [context] if context else []
    return rest, found


def _context(saved_groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The group that carries the checkpoint's context, which is in order; None if none does.

    It was saved in the first one, but trainers that keep groups by name bring them in another order, or drop some.
    """
    for number, saved_group in enumerate(saved_groups):
        if memory.is_in(saved_group):
            if memory.is_of_an_older_law(saved_group):
                return saved_group
            try:
                memory.check(saved_group)
            except ValueError as error:
                raise ValueError(f"parameter group {number} of the checkpoint: {error}") from None
            return saved_group
    return None


@dataclass
class _Changes:
    """How the states that an optimizer gets differ from those of its checkpoint.

    Attributes:
        converted: how many parameters had states converted to another precision.
        freed: names of states that this optimizer does not have, and of how many parameters each.
        fresh: names of states that the checkpoint does not have, likewise.
        context: what becomes of the context, where only one of the two has it.
    """

    converted: int = 0
    freed: Counter[str] = field(default_factory=Counter)
    fresh: Counter[str] = field(default_factory=Counter)
    context: str = ""

    def describe(self) -> str:
        """One log line."""
        parts = [self.context] if self.context else []
        if self.converted:
            parts.append(f"the states of {self.converted} parameters are converted to the precision of this optimizer")
        for what, names in (("are freed", self.freed), ("start fresh", self.fresh)):
            if names:
                listed = ", ".join(f"{name} of {count}" for name, count in names.items())
                parts.append(f"states that {what}: {listed} parameters")
        return "; ".join(parts)


def _check_top_level(saved: Mapping[str, Any], groups: Sequence[Group]) -> None:
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"the checkpoint has no '{key}'; it is not an optimizer's")
    if not isinstance(saved["state"], Mapping) or not isinstance(saved["param_groups"], (list, tuple)):
        raise ValueError("the checkpoint's 'state' must be a dictionary and its 'param_groups' a list")
    if len(saved["param_groups"]) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved['param_groups'])} parameter groups, the optimizer {len(groups)}"
        )
    for number, (saved_group, group) in enumerate(zip(saved["param_groups"], groups)):
        if not isinstance(saved_group, Mapping) or not isinstance(saved_group.get("params"), (list, tuple)):
            raise ValueError(f"parameter group {number} of the checkpoint has no list 'params'")
        if len(saved_group["params"]) != len(group.params):
            raise ValueError(
                f"parameter group {number} of the checkpoint has {len(saved_group['params'])} parameters, "
                f"the optimizer's has {len(group.params)}"
            )
    keys = [key for saved_group in saved["param_groups"] for key in saved_group["params"]]
    if not all(isinstance(key, (int, str)) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("the checkpoint's groups do not list each parameter once, by a number or name of its own")


def _check_version(saved: Mapping[str, Any]) -> None:
    version = saved.get("magic_version", VERSION)
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(
            f"the checkpoint has magic_version {version!r}; this optimizer reads version {VERSION}, "
            f"and version {older_layout.VERSION} of an older implementation"
        )


def _check_groups(saved: Mapping[str, Any], groups: Sequence[Group], labels: Mapping[Tensor, str]) -> bool:
    """Check that the groups are this family's and what they were saved as.

    Returns:
        Whether the checkpoint carries checksums. Only one that went through torch.distributed.checkpoint's flat layout
        may lack them: that layout drops every entry that a newly built optimizer does not have.
    """
    for number, (saved_group, group) in enumerate(zip(saved["param_groups"], groups)):
        if "lr" not in saved_group or "warmup_steps" not in saved_group:
            raise ValueError(_of_another_optimizer(number, saved, group, labels))
        _learning_rates(number, saved_group)
    present = [name in saved_group for saved_group in saved["param_groups"] for name in CHECKSUMS]
    if "magic_version" not in saved and not any(present):
        return False
    for number, saved_group in enumerate(saved["param_groups"]):
        label = f"parameter group {number} of the checkpoint"
        for name in CHECKSUMS:
            if name not in saved_group:
                raise ValueError(f"{label} has no '{name}'")
        checksums = saved_group["state_checksums"]
        if not isinstance(checksums, (list, tuple)) or len(checksums) != len(saved_group["params"]):
            raise ValueError(f"{label} has not one entry of 'state_checksums' for each parameter")
        if saved_group["group_checksum"] != group_checksum(saved_group):
            raise ValueError(f"{label} does not match its checksum: its options or its list of states were {_DAMAGED}")
    return True


def _of_another_optimizer(number: int, saved: Mapping[str, Any], group: Group, labels: Mapping[Tensor, str]) -> str:
    saved_group = saved["param_groups"][number]
    reason = f"parameter group {number} of the checkpoint is another optimizer's: it has no lr or no warmup_steps"
    for p, key in zip(group.params, saved_group["params"]):
        state = saved["state"].get(key)
        if isinstance(state, Mapping) and state:
            return f"{labels[p]}: its state has {', '.join(map(str, state))}; {reason}"
    return reason


def _check_names(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    names: Mapping[Tensor, str],
    labels: Mapping[Tensor, str],
) -> list[str]:
    """Check that every parameter gets its own state, where the checkpoint and the optimizer both know names.

    If they share not a single name, they use two naming schemes, which says nothing about the order.

    Returns:
        Log lines.
    """
    pairs = []
    for number, (saved_group, group) in enumerate(zip(saved_groups, groups)):
        saved_names = saved_group.get("param_names", [""] * len(group.params))
        of_text = isinstance(saved_names, (list, tuple)) and all(isinstance(name, str) for name in saved_names)
        if not of_text or len(saved_names) != len(group.params):
            raise ValueError(f"parameter group {number} of the checkpoint has not one name for each parameter")
        pairs += [(p, name) for p, name in zip(group.params, saved_names) if name and p in names]
    if not pairs:
        return []
    if not {name for _, name in pairs} & {names[p] for p, _ in pairs}:
        return [f"it names parameters in another way ('{pairs[0][1]}'), so only their order and shapes are compared"]
    for p, name in pairs:
        if names[p] != name:
            raise ValueError(f"{labels[p]}: the checkpoint has '{name}' in its place")
    return []


def _owners(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Group], labels: Mapping[Tensor, str]
) -> dict[int, str]:
    """Whose state has which checksum."""
    return {
        expected: labels[p]
        for saved_group, group in zip(saved_groups, groups)
        for p, expected in zip(group.params, saved_group["state_checksums"])
        if expected is not None
    }


class _Checksums:
    """Compares saved states with their checksums; those of shards together, when all are known.

    Args:
        processes: those that hold the shards.

    Attributes:
        owners: whose state has which checksum.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._waiting: list[tuple[dict[str, Any], int, str, dict[str, Tensor]]] = []
        self.owners: dict[int, str] = {}

    def add(self, saved: Mapping[str, Any], expected: int, label: str) -> None:
        """Compare the state of one parameter, or have it compared.

        Raises:
            ValueError: it is not what was saved.
        """
        covered = {**{key: value for key, value in saved.items() if key not in DERIVED}, "step": _step(saved)}
        tensors = {key: value for key, value in covered.items() if isinstance(value, Tensor)}
        if not any(is_sharded(value) for value in tensors.values()):
            self._compare(checksum(covered), expected)
            return
        sums = {key: sharded.own_sum(value, self._processes) for key, value in tensors.items()}
        self._waiting.append((covered, expected, label, sums))

    def compare(self) -> None:
        """Compare those that wait.

        Raises:
            ValueError: as `add`, with the parameter.
        """
        if not self._waiting:
            return
        own = torch.stack([value for *_, sums in self._waiting for value in sums.values()])
        totals = iter(self._processes.add_up([own])[0].tolist())
        for covered, expected, label, sums in self._waiting:
            try:
                self._compare(checksum(covered, {key: next(totals) for key in sums}), expected)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None

    def _compare(self, found: int, expected: int) -> None:
        if found == expected:
            return
        if found in self.owners:
            raise ValueError(f"its state is the one of {self.owners[found]}")
        raise ValueError(f"its state does not match its checksum: it was {_DAMAGED}, or trained on without a copy")


def _learning_rates(number: int, saved_group: Mapping[str, Any]) -> dict[str, float]:
    rates = {}
    for name in ("lr", "initial_lr"):
        if name in saved_group:
            value = saved_group[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(f"parameter group {number} of the checkpoint has {name} {value!r}")
            rates[name] = value
    # The scheduler's factor is a ratio of the two; without the second it would be taken to the constructor's lr.
    rates.setdefault("initial_lr", rates["lr"])
    return rates


def _magnitudes(number: int, saved_group: Mapping[str, Any]) -> dict[str, Tensor]:
    if MAGNITUDES not in saved_group:
        return {}
    value = saved_group[MAGNITUDES]
    usable = isinstance(value, Tensor) and value.shape == (4,) and value.dtype == torch.float32
    if not usable or not (value >= 0).all():  # The sum is infinite where float32 has no number for it.
        raise ValueError(f"parameter group {number} of the checkpoint has {MAGNITUDES} {value!r}")
    return {MAGNITUDES: value.clone()}


def _option_differences(number: int, saved_group: Mapping[str, Any], config: OptimizerConfig) -> list[str]:
    differences = []
    for name in OPTION_NAMES:
        if name != "lr" and name in saved_group:
            saved, own = saved_group[name], getattr(config, name)
            if (tuple(saved) if isinstance(saved, list) else saved) != own:
                differences.append(f"group {number} {name} {saved} -> {own}")
    return differences


class _Part:
    """What a process gets of one parameter's saved state.

    Args:
        p: the parameter.
        saved: its saved state, whose tensors are cut as it is, or whole.

    Attributes:
        p: the parameter.
        cut: which part of it is here.
        saved: its saved state, of DTensors the parts that are here.
        shape: the shape of the rows of the parameter that are here.
        saved_shape: the shape of those that `saved` has.
        in_parts: whether each process has its own part of what is saved; else all have all of it.
        first_element: the first element that is here.
    """

    def __init__(self, p: Tensor, saved: Mapping[str, Any]) -> None:
        self.p = p
        self.cut = cut = cut_of(p)
        self._first, self._rows = cut.rows(p.shape)
        self.first_element = self._first * p.shape[1:].numel()
        self.shape = torch.Size((self._rows, *p.shape[1:])) if p.ndim else p.shape
        parts = any(isinstance(value, Tensor) and is_sharded(value) for value in saved.values())
        if parts and cut is WHOLE:
            raise ValueError("its state is sharded, and it is not; load a full state dict")
        self.in_parts, self.saved_shape = parts, self.shape if parts else p.shape
        self.saved = {
            key: cut.local([value])[0] if isinstance(value, Tensor) else value for key, value in saved.items()
        }

    @property
    def is_as_saved(self) -> bool:
        """Whether what is saved is what is here, no more."""
        return self.saved_shape == self.shape

    def own_rows(self, value: Tensor) -> Tensor:
        """Of a state of `saved_shape`, the rows that are here."""
        return value if self.is_as_saved else value[self._first : self._first + self._rows]

    def wrapped(self, tensors: Mapping[str, Tensor], own: Format) -> dict[str, Tensor]:
        """Tensors in the optimizer's own format as its state holds them."""
        rows = self.p.shape[0] if self.p.ndim else 1
        kinds = own.parts(self.shape).values()
        return {
            key: self.cut.wrapped([tensor], kind.spread, rows)[0] for (key, tensor), kind in zip(tensors.items(), kinds)
        }


class _Pending(NamedTuple):
    """A momentum of shards that was saved in another form, and of which all processes make one of low rank together.

    Attributes:
        part: what this process gets of the parameter's state.
        keys: of the momentum's tensors.
        own: its format; not of low rank where this process alone cannot code it.
        value: its rows that are here.
        dither: what rounding depends on.
    """

    part: _Part
    keys: tuple[str, ...]
    own: ShardAverageFormat
    value: Tensor
    dither: Dither


def _follow_together(pending: Sequence[_Pending], processes: Processes) -> list[dict[str, Tensor]]:
    """The tensors of momenta of low rank, by key, as far as they are here; one message."""
    states = [_new_of_shard(each) for each in pending]
    targets = [each.value.reshape(1, state.rows, state.columns) for each, state in zip(pending, states)]
    parts = [
        (each.part.cut, state.summands(target, 1.0, each.dither))
        for each, state, target in zip(pending, states, targets)
    ]
    for each, state, target, totals in zip(pending, states, targets, totals_of(processes, parts)):
        state.knowing(totals, None).lerp(target, 1.0, each.dither)
    return [
        each.part.wrapped({key: tensor[0] for key, tensor in zip(each.keys, state.tensors)}, each.own)
        for each, state in zip(pending, states)
    ]


def _new_of_shard(pending: _Pending) -> StoredShardAverage:
    state = pending.own.new(1, pending.part.shape, pending.value.device)
    assert isinstance(state, StoredShardAverage)
    return state


class _Reader:
    """Reads the states of one group's parameters.

    Args:
        group: the optimizer's group.
        saved_group: the checkpoint's.
        has_momenta: whether the checkpoint is of an optimizer with multi-scale momenta.
        changes: where to add what differs.

    Attributes:
        uncoded: parameters whose device cannot code their states.
        reason: why, for the last of them.
        pending: what the processes make together.
    """

    def __init__(self, group: Group, saved_group: Mapping[str, Any], has_momenta: bool, changes: _Changes) -> None:
        self._group = group
        self._config = _config_as_saved(group.number, saved_group, group.config, has_momenta)
        self._momenta = [momentum(period) for period in self._config.momentum_scales] if has_momenta else []
        self._changes = changes
        self.uncoded: set[Tensor] = set()
        self.reason = ""
        self.pending: list[_Pending] = []

    def without_leftovers(self, saved: Any) -> Any:
        """A parameter's saved state without states of the warm-up, if that was over.

        To have states to read into, torch.distributed.checkpoint takes a step, which is one of the warm-up. What the
        checkpoint does not have stays as that step left it.
        """
        if not isinstance(saved, Mapping) or _step(saved) < self._config.warmup_steps:
            return saved
        leftovers = {row.name + end for row in TABLE if row.warmup_only for end in ("", "_q", "_q_scale")}
        return {key: value for key, value in saved.items() if key not in leftovers}

    def read(self, saved: Any, p: Tensor, position: int) -> dict[str, Any]:
        """The new state of one parameter; in 32 bits if its device cannot code it.

        What differs from the checkpoint is added to the changes.

        Args:
            saved: what the checkpoint holds of it.
            p: the parameter.
            position: its number in the optimizer.

        Raises:
            ValueError: what is wrong with it.
        """
        try:
            return self._read(saved, p, position)
        except RuntimeError as error:
            wanted = self._group.states(Phase.at(_step(saved), self._group.config.warmup_steps))
            if can_store([self._format(row, p) for row in wanted], p.shape, p.device, error):
                raise
            self.uncoded.add(p)
            self.reason = str(error)
            self.pending = [each for each in self.pending if each.part.p is not p]
            return self._read(saved, p, position)

    def _read(self, saved: Any, p: Tensor, position: int) -> dict[str, Any]:
        if not isinstance(saved, Mapping):
            raise ValueError(f"its state is {type(saved).__name__}, not a dictionary")
        if p.numel() == 0:
            raise ValueError("it has no elements, and so no state")
        step = _step(saved)
        part = _Part(p, saved)
        saved = part.saved
        owed = self._owed(saved, step)
        wanted = self._group.states(Phase.at(step, self._group.config.warmup_steps))
        names = {row.name for row in wanted}
        restored: dict[str, Any] = {"step": step}
        known = {"step", *DERIVED}
        converted = False
        for row in owed:
            written = row.format_of(saved, part.saved_shape, self._config, p.shape)
            if written is None:
                key = row.name + THIRTY_TWO_BITS.format(row, p.shape, self._config).suffixes[0]
                when = "" if row.counter else f", which step {step} of {self._config.warmup_steps} warm-up steps has"
                raise ValueError(f"the state '{key}' is missing{when}")
            known.update(written.keys(row.name))
            if row.counter:
                known.add(row.counter)
                count = _count(saved, row.counter)
                restored |= {row.counter: count} if row.name in names else {}
            if row.name in names:
                tensors, was_converted = self._tensors(row, part, written, position, step)
                restored |= tensors
                converted |= was_converted
        for key in saved:
            if key not in known:
                raise ValueError(f"the state '{key}' is not one that step {step} of this optimizer has")
        self._note(owed, wanted, converted)
        restored.update((row.counter, 0) for row in wanted if row.counter and row.counter not in restored)
        return restored

    def _owed(self, saved: Mapping[str, Any], step: int) -> list[State]:
        """The states that the checkpoint's own class and phase owe a parameter."""
        phase = Phase.at(step, self._config.warmup_steps)
        owed = [row for row in TABLE if row.lives(phase, self._config.came)]
        passing = [row for row in owed if row.warmup_only]
        if not any(key in saved for row in passing for key in (row.name, f"{row.name}_q")):
            # Saved between a resume into a longer warm-up and the step that would have begun them.
            owed = [row for row in owed if not row.warmup_only]
        return owed + self._momenta

    def _tensors(
        self, row: State, part: _Part, written: Format, position: int, step: int
    ) -> tuple[dict[str, Tensor], bool]:
        """One state as the optimizer stores it, by key, and whether it was written in another kind of format."""
        p, saved = part.p, part.saved
        own, config = self._format(row, p), self._group.config
        value = None
        if row.within_lr_bounds:
            value = to_full(row, saved, written, part.saved_shape)
            if _outside(value, config):
                value.clamp_(config.min_lr, config.max_lr)
            elif written == own:
                value = None
        together = _is_made_together(own, written, part)
        if written == saved_format(own, part.shape) and value is None and part.is_as_saved and not together:
            tensors = {key: saved[key].detach().to(p.device, copy=True) for key in own.keys(row.name)}
            live = _live(tensors, own, part.shape)
            if live is not None:
                return part.wrapped(live, own), False
        value = (to_full(row, saved, written, part.saved_shape) if value is None else value).to(p.device)
        dither = Dither(torch.tensor([position], dtype=torch.int32, device=p.device), step + 1, part.first_element)
        if together:
            assert isinstance(own, ShardAverageFormat)
            self.pending.append(_Pending(part, own.keys(row.name), own, part.own_rows(value), dither))
            return {}, True
        converted = type(written) is not type(saved_format(own, part.shape)) or bool(row.counter)
        return part.wrapped(in_format(row.name, part.own_rows(value), own, part.shape, dither), own), converted

    def _format(self, row: State, p: Tensor) -> Format:
        code = self._group.format(row, p)
        return uncoded(row, code) if p in self.uncoded else code

    def _note(self, owed: Sequence[State], wanted: Sequence[State], converted: bool) -> None:
        """Add what differs to the changes, except momenta, which the context's own line covers."""
        names, owed_names = {row.name for row in wanted}, {row.name for row in owed}
        self._changes.converted += converted
        self._changes.freed.update(row.name for row in owed if not row.counter and row.name not in names)
        self._changes.fresh.update(row.name for row in wanted if not row.counter and row.name not in owed_names)


def _is_made_together(own: Format, written: Format, part: _Part) -> bool:
    """Whether the processes make a state of this format together: also this one's part, if it cannot code its own."""
    code = own.coded if isinstance(own, FullOfShard) else own
    if not isinstance(code, LowRankOfShard):
        return False
    # Only of what all processes know alike: a parameter of one row is all here on one of them, and not on the others.
    return not part.in_parts or written != saved_format(code, part.shape)


def _live(tensors: dict[str, Tensor], own: Format, shape: torch.Size) -> dict[str, Tensor] | None:
    """What a checkpoint has of a state, as the optimizer holds it; None if its codes must be made anew."""
    if not isinstance(own, ShardFormat):
        return tensors
    found = own.from_rows([tensor.unsqueeze(0) for tensor in tensors.values()], shape)
    return None if found is None else {key: tensor[0] for key, tensor in zip(tensors, found)}


def _config_as_saved(
    number: int, saved_group: Mapping[str, Any], config: OptimizerConfig, has_momenta: bool
) -> OptimizerConfig:
    """The options that the checkpoint was written under, as far as they decide which states it owes."""
    warmup_steps = saved_group.get("warmup_steps", config.warmup_steps)
    came = saved_group.get("came", config.came)
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or not isinstance(came, bool):
        raise ValueError(
            f"parameter group {number} of the checkpoint has warmup_steps {warmup_steps!r} and came {came!r}"
        )
    scales = saved_group.get("momentum_scales", config.momentum_scales) if has_momenta else config.momentum_scales
    try:
        return config.replace(warmup_steps=warmup_steps, came=came, momentum_scales=scales)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's {error}") from None


def _count(saved: Mapping[str, Any], key: str) -> int:
    count = saved.get(key)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"the state '{key}' is {count!r}, not a whole number of at least 0")
    return count


def _holds_momenta(states: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(state, Mapping) and any(str(key).startswith(MOMENTUM_PREFIX) for key in state)
        for state in states.values()
    )


def _outside(mask: Tensor, config: OptimizerConfig) -> bool:
    """Whether a learning-rate mask leaves the bounds, by more than rounding."""
    return mask.numel() > 0 and bool(
        mask.amin() < config.min_lr * (1 - 1e-6) or mask.amax() > config.max_lr * (1 + 1e-6)
    )


def _step(saved: Mapping[str, Any]) -> int:
    step = saved.get("step")
    if isinstance(step, Tensor) and step.numel() == 1 and not step.is_floating_point():
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"its step is {step!r}, not a whole number of at least 0")
    return step

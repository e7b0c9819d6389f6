"""Reading a checkpoint: check all of it, convert what can be, and only then hand it over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import context, older_layout
from .checksum import checksum
from .config import OPTION_NAMES, OptimizerConfig
from .rules import Phase
from .storage import Storage
from .storage.convert import coded_storage_of, storage_of, to_full
from .storage.momenta import momentum_storages
from .techniques.multiscale import momentum_count, momentum_name

# Layout of the checkpoints written here; 1 and 2 are those of an older implementation.
VERSION = 3

# Written for whoever reads a checkpoint; computed from the rest, so ignored here.
_DERIVED = ("avg_lr", "lr_max", "row_scaling")

_CHECKSUMS = ("state_checksums", "group_checksum")
_DAMAGED = "damaged or edited after it was saved"

# What the checksum of a saved group covers.
_SEALED = ("initial_lr", "param_names", "state_checksums", *context.SAVED, *OPTION_NAMES)


def sealed(saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as it is saved, with the checksum of its options and, through `state_checksums`, of all its states."""
    return {**saved_group, "group_checksum": _group_checksum(saved_group)}


def _group_checksum(saved_group: Mapping[str, Any]) -> int:
    return checksum({name: saved_group[name] for name in _SEALED if name in saved_group})


@dataclass
class Restored:
    """What a checkpoint gives an optimizer.

    Attributes:
        state: the new state of each parameter that has one.
        learning_rates: for each group, `lr` and `initial_lr`.
        context: what the context is to take over; None where it starts afresh, or there is none.
        notes: what differs from the checkpoint, a log line each.
    """

    state: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    learning_rates: list[dict[str, float]] = field(default_factory=list)
    context: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def restore(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    configs: Sequence[OptimizerConfig],
    names: Mapping[Tensor, str],
    storage: Callable[[str, Tensor, OptimizerConfig], Storage],
    contextual: bool,
) -> Restored:
    """Check a checkpoint against an optimizer, and convert it.

    Args:
        saved: what `state_dict()` returned. `magic_version` may be missing: torch.distributed.checkpoint drops it.
        groups: the optimizer's parameter groups.
        configs: their options.
        names: parameter names where known, for error messages.
        storage: how the optimizer keeps a state of a parameter under a group's options.
        contextual: whether the optimizer has a context and multi-scale momenta.

    Returns:
        The new states, on their parameters' devices. Neither argument is changed.

    Raises:
        ValueError: what does not fit, with the parameter's number, shape and name.
    """
    _check_top_level(saved, groups)
    labels = _labels(groups, names)
    restored = Restored()
    if older_layout.is_written_in(saved):
        saved = older_layout.converted(saved, groups, labels)
        restored.notes.append(older_layout.NOTE)
        carries_checksums = False
    else:
        _check_version(saved)
        carries_checksums = _check_groups(saved, groups, labels)
        if not carries_checksums and saved["state"]:
            restored.notes.append("it carries no checksums, so damage to it would not be seen")
    restored.notes += _check_names(saved["param_groups"], groups, names, labels)
    was_contextual = bool(saved["param_groups"]) and context.is_in(saved["param_groups"][0])
    if was_contextual:
        try:
            context.check(saved["param_groups"][0])
        except ValueError as error:
            raise ValueError(f"parameter group 0 of the checkpoint: {error}") from None
        restored.context = saved["param_groups"][0] if contextual else None
    states = saved["state"]
    seen = set()
    changes = _Changes()
    if states and contextual != was_contextual:
        changes.context = _CONTEXT_BEGINS if contextual else _CONTEXT_ENDS
    has_momenta = was_contextual
    if not carries_checksums and contextual and not was_contextual and _holds_momenta(states):
        # What torch.distributed.checkpoint's flat layout leaves of a contextual optimizer.
        has_momenta, changes.context = True, _CONTEXT_LOST
    differences: list[str] = []
    owners = _owners(saved["param_groups"], groups, labels) if carries_checksums else {}
    for number, (group, saved_group, config) in enumerate(zip(groups, saved["param_groups"], configs)):
        restored.learning_rates.append(_learning_rates(number, saved_group))
        differences += _option_differences(number, saved_group, config)
        phase_options = _phase_options(number, saved_group, config)
        periods = _momentum_scales(saved_group, config) if has_momenta else ()
        wanted = config.momentum_scales if contextual else ()
        checksums = saved_group["state_checksums"] if carries_checksums else [None] * len(group["params"])
        for p, key, expected in zip(group["params"], saved_group["params"], checksums):
            seen.add(key)
            has_state = key in states and (not isinstance(states[key], Mapping) or len(states[key]) > 0)
            try:
                if carries_checksums and has_state != (expected is not None):
                    raise ValueError("its state is missing" if expected else "it was saved without the state it has")
                if has_state:
                    restored.state[p], converted = _restore_parameter(
                        states[key], p, phase_options, config, storage, changes
                    )
                    momenta, also_converted = _restore_momenta(states[key], p, periods, wanted, config, storage)
                    restored.state[p].update(momenta)
                    changes.converted += converted or also_converted
                    if carries_checksums:
                        _check_checksum(states[key], expected, owners)
            except ValueError as error:
                raise ValueError(f"{labels[p]}: {error}") from None
    unknown = [key for key in states if key not in seen]
    if unknown:
        raise ValueError(f"the checkpoint has states of parameters that no group lists: {unknown[:5]}")
    if any(changes.__dict__.values()):
        restored.notes.append(changes.describe())
    if differences:
        restored.notes.append(
            "options differ from the checkpoint's; the constructor's are used: " + "; ".join(differences)
        )
    return restored


_CONTEXT_BEGINS = "it is of an optimizer without context: multiplier, histories and momenta start fresh"
_CONTEXT_LOST = "it has momenta but no context: multiplier and histories start fresh"
_CONTEXT_ENDS = "its context and its multi-scale momenta are freed: this optimizer has none"


@dataclass
class _Changes:
    """How the states that an optimizer gets differ from those of its checkpoint.

    Attributes:
        converted: of how many parameters states are kept in another precision.
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


def _check_top_level(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
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
        if len(saved_group["params"]) != len(group["params"]):
            raise ValueError(
                f"parameter group {number} of the checkpoint has {len(saved_group['params'])} parameters, "
                f"the optimizer's has {len(group['params'])}"
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


def _check_groups(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], labels: Mapping[Tensor, str]) -> bool:
    """Check that the groups are this family's and what they were saved as.

    Returns:
        Whether the checkpoint carries checksums. Only one that went through torch.distributed.checkpoint's flat layout
        may not: that keeps nothing that a new optimizer does not have.
    """
    for number, (saved_group, group) in enumerate(zip(saved["param_groups"], groups)):
        if "lr" not in saved_group or "warmup_steps" not in saved_group:
            raise ValueError(_of_another_optimizer(number, saved, group, labels))
        _learning_rates(number, saved_group)
    present = [name in saved_group for saved_group in saved["param_groups"] for name in _CHECKSUMS]
    if "magic_version" not in saved and not any(present):
        return False
    for number, saved_group in enumerate(saved["param_groups"]):
        label = f"parameter group {number} of the checkpoint"
        for name in _CHECKSUMS:
            if name not in saved_group:
                raise ValueError(f"{label} has no '{name}'")
        checksums = saved_group["state_checksums"]
        if not isinstance(checksums, (list, tuple)) or len(checksums) != len(saved_group["params"]):
            raise ValueError(f"{label} has not one entry of 'state_checksums' for each parameter")
        if saved_group["group_checksum"] != _group_checksum(saved_group):
            raise ValueError(f"{label} does not match its checksum: its options or its list of states were {_DAMAGED}")
    return True


def _of_another_optimizer(
    number: int, saved: Mapping[str, Any], group: Mapping[str, Any], labels: Mapping[Tensor, str]
) -> str:
    saved_group = saved["param_groups"][number]
    reason = f"parameter group {number} of the checkpoint is another optimizer's: it has no lr or no warmup_steps"
    for p, key in zip(group["params"], saved_group["params"]):
        state = saved["state"].get(key)
        if isinstance(state, Mapping) and state:
            return f"{labels[p]}: its state has {', '.join(map(str, state))}; {reason}"
    return reason


def _check_names(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    labels: Mapping[Tensor, str],
) -> list[str]:
    """Check that every parameter gets its own state, where the checkpoint and the optimizer both know names.

    Names without a single one in common are of two naming schemes, which says nothing about the order.

    Returns:
        Log lines.
    """
    pairs = []
    for number, (saved_group, group) in enumerate(zip(saved_groups, groups)):
        saved_names = saved_group.get("param_names", [""] * len(group["params"]))
        of_text = isinstance(saved_names, (list, tuple)) and all(isinstance(name, str) for name in saved_names)
        if not of_text or len(saved_names) != len(group["params"]):
            raise ValueError(f"parameter group {number} of the checkpoint has not one name for each parameter")
        pairs += [(p, name) for p, name in zip(group["params"], saved_names) if name and p in names]
    if not pairs:
        return []
    if not {name for _, name in pairs} & {names[p] for p, _ in pairs}:
        return [f"it names parameters in another way ('{pairs[0][1]}'), so only their order and shapes are compared"]
    for p, name in pairs:
        if names[p] != name:
            raise ValueError(f"{labels[p]}: the checkpoint has '{name}' in its place")
    return []


def _owners(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], labels: Mapping[Tensor, str]
) -> dict[int, str]:
    """Whose state has which checksum."""
    return {
        expected: labels[p]
        for saved_group, group in zip(saved_groups, groups)
        for p, expected in zip(group["params"], saved_group["state_checksums"])
        if expected is not None
    }


def _check_checksum(saved: Mapping[str, Any], expected: int, owners: Mapping[int, str]) -> None:
    found = checksum({**{key: value for key, value in saved.items() if key not in _DERIVED}, "step": _step(saved)})
    if found == expected:
        return
    if found in owners:
        raise ValueError(f"its state is the one of {owners[found]}")
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


def _option_differences(number: int, saved_group: Mapping[str, Any], config: OptimizerConfig) -> list[str]:
    differences = []
    for name in OPTION_NAMES:
        if name != "lr" and name in saved_group:
            saved, own = saved_group[name], getattr(config, name)
            if (tuple(saved) if isinstance(saved, list) else saved) != own:
                differences.append(f"group {number} {name} {saved} -> {own}")
    return differences


def _phase_options(number: int, saved_group: Mapping[str, Any], config: OptimizerConfig) -> tuple[int, bool]:
    """`warmup_steps` and `came` that the checkpoint was written under: they decide which states it owes."""
    warmup_steps = saved_group.get("warmup_steps", config.warmup_steps)
    came = saved_group.get("came", config.came)
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or not isinstance(came, bool):
        raise ValueError(
            f"parameter group {number} of the checkpoint has warmup_steps {warmup_steps!r} and came {came!r}"
        )
    return warmup_steps, came


def _restore_parameter(
    saved: Any,
    p: Tensor,
    saved_options: tuple[int, bool],
    config: OptimizerConfig,
    storage: Callable[[str, Tensor, OptimizerConfig], Storage],
    changes: _Changes,
) -> tuple[dict[str, Any], bool]:
    """The new state of one parameter, and whether any of it was kept in another way.

    What this optimizer does not have, or the checkpoint has not, is added to `changes`.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"its state is {type(saved).__name__}, not a dictionary")
    step = _step(saved)
    warmup_steps, came = saved_options
    phase = Phase.at(step, warmup_steps)
    owed, lasting = phase.state_names(came), phase._replace(warmup=False).state_names(came)
    wanted = Phase.at(step, config.warmup_steps).state_names(config.came)
    if not any(key in saved for name in owed if name not in lasting for key in (name, f"{name}_q")):
        owed = lasting  # Saved between a resume into a longer warm-up and the step that would have begun the others.
    restored: dict[str, Any] = {"step": step}
    known = {"step", *_DERIVED}
    converted, freed = False, []
    for name in owed:
        kept = storage_of(name, saved, p.shape)
        if kept is None:
            raise ValueError(f"the state '{name}' is missing, which step {step} of {warmup_steps} warm-up steps has")
        known.update(kept.keys(name))
        if name not in wanted:
            freed.append(name)
            continue
        own = storage(name, p, config)
        value = to_full(name, saved, kept, p.shape) if kept != own or name == "lr_mask" else None
        outside = name == "lr_mask" and _outside(value, config)
        if kept == own and not outside:
            restored.update((key, saved[key].detach().to(p.device, copy=True)) for key in kept.keys(name))
            continue
        assert value is not None
        restored[name] = (value.clamp(config.min_lr, config.max_lr) if outside else value).to(p.device)
        converted |= type(kept) is not type(own)
    for key in saved:
        if key not in known and not str(key).startswith("momentum_"):  # Those are checked apart.
            raise ValueError(f"the state '{key}' is not one that step {step} of this optimizer has")
    changes.freed.update(freed)
    changes.fresh.update(name for name in wanted if name not in owed)
    return restored, converted


def _holds_momenta(states: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(state, Mapping) and any(str(key).startswith("momentum_") for key in state)
        for state in states.values()
    )


def _momentum_scales(saved_group: Mapping[str, Any], config: OptimizerConfig) -> tuple[int, ...]:
    """The periods of the momenta that the checkpoint was written with."""
    periods = saved_group.get("momentum_scales", config.momentum_scales)
    try:
        return config.replace(momentum_scales=periods).momentum_scales
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's {error}") from None


def _restore_momenta(
    saved: Mapping[str, Any],
    p: Tensor,
    periods: tuple[int, ...],
    wanted: tuple[int, ...],
    config: OptimizerConfig,
    storage: Callable[[str, Tensor, OptimizerConfig], Storage],
) -> tuple[dict[str, Any], bool]:
    """The multi-scale momenta of one parameter, and whether any of them was kept in another way."""
    coded = momentum_storages(periods, p.shape) if p.numel() else {}
    restored: dict[str, Any] = {}
    known: set[str] = set()
    converted = False
    for period in periods if p.numel() else ():
        name, count = momentum_name(period), momentum_count(period)
        updates = saved.get(count)
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
            raise ValueError(f"the state '{count}' is {updates!r}, not a whole number of at least 0")
        kept = coded_storage_of(name, saved, p.shape, coded[period])
        known.update((count, *kept.keys(name)))
        if period not in wanted:
            continue
        restored[count] = updates
        if kept == storage(name, p, config):
            restored.update((key, saved[key].detach().to(p.device, copy=True)) for key in kept.keys(name))
        else:
            restored[name] = to_full(name, saved, kept, p.shape).to(p.device)
            converted = True
    if p.numel():
        restored.update((momentum_count(period), 0) for period in wanted if period not in periods)
    for key in saved:
        if str(key).startswith("momentum_") and key not in known:
            raise ValueError(f"the state '{key}' is not one that momentum_scales {periods} has")
    return restored, converted


def _outside(mask: Tensor | None, config: OptimizerConfig) -> bool:
    """Whether a learning-rate mask leaves the bounds, by more than rounding."""
    if mask is None or mask.numel() == 0:
        return False
    return bool(mask.amin() < config.min_lr * (1 - 1e-6) or mask.amax() > config.max_lr * (1 + 1e-6))


def _step(saved: Mapping[str, Any]) -> int:
    step = saved.get("step")
    if isinstance(step, Tensor) and step.numel() == 1 and not step.is_floating_point():
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"its step is {step!r}, not a whole number of at least 0")
    return step


def _labels(groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """What error messages call each parameter."""
    parameters = (p for group in groups for p in group["params"])
    return {
        p: f"parameter {position}" + (f" '{names[p]}'" if p in names else "") + f" of shape {tuple(p.shape)}"
        for position, p in enumerate(parameters)
    }

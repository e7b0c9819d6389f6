"""Reading a checkpoint: check all of it, convert what can be, and only then hand it over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import context
from .config import OPTION_NAMES, OptimizerConfig
from .rules import Phase, momentum_count, momentum_name
from .storage import Storage
from .storage.convert import coded_storage_of, storage_of, to_full
from .storage.momenta import momentum_storages

# Layout of the checkpoints written here; 1 and 2 are those of an older implementation.
VERSION = 3

# Written for whoever reads a checkpoint; computed from the rest, so ignored here.
_DERIVED = ("avg_lr", "lr_max", "row_scaling")


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
    restored = Restored()
    was_contextual = bool(saved["param_groups"]) and context.is_in(saved["param_groups"][0])
    if was_contextual:
        context.check(saved["param_groups"][0])
        restored.context = saved["param_groups"][0] if contextual else None
    states = saved["state"]
    if states and contextual != was_contextual:
        restored.notes.append(
            "the checkpoint is of an optimizer without context: multiplier, histories and momenta start afresh"
            if contextual
            else "the context and the multi-scale momenta of the checkpoint are left out: this optimizer has none"
        )
    seen = set()
    position = 0
    converted = 0
    differences: list[str] = []
    for number, (group, saved_group, config) in enumerate(zip(groups, saved["param_groups"], configs)):
        restored.learning_rates.append(_learning_rates(number, saved_group))
        differences += _option_differences(number, saved_group, config)
        for p, key in zip(group["params"], saved_group["params"]):
            label = _label(position, p, names)
            position += 1
            seen.add(key)
            if key in states and (not isinstance(states[key], Mapping) or states[key]):
                saved_options = _phase_options(saved_group, config)
                periods = _momentum_scales(saved_group, config) if was_contextual else ()
                wanted = config.momentum_scales if contextual else ()
                try:
                    restored.state[p], was_converted = _restore_parameter(
                        states[key], p, saved_options, config, storage
                    )
                    momenta, also_converted = _restore_momenta(states[key], p, periods, wanted, config, storage)
                    restored.state[p].update(momenta)
                    was_converted |= also_converted
                except ValueError as error:
                    raise ValueError(f"{label}: {error}") from None
                converted += was_converted
    unknown = [key for key in states if key not in seen]
    if unknown:
        raise ValueError(f"the checkpoint has states of parameters that no group lists: {unknown[:5]}")
    if converted:
        restored.notes.append(f"the states of {converted} parameters are converted to the precision of this optimizer")
    if differences:
        restored.notes.append(
            "options differ from the checkpoint's; the constructor's are used: " + "; ".join(differences)
        )
    return restored


def _check_top_level(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"the checkpoint has no '{key}'; it is not an optimizer's")
    if not isinstance(saved["state"], Mapping) or not isinstance(saved["param_groups"], (list, tuple)):
        raise ValueError("the checkpoint's 'state' must be a dictionary and its 'param_groups' a list")
    version = saved.get("magic_version", VERSION)
    if version != VERSION:
        raise ValueError(f"the checkpoint has magic_version {version!r}; this optimizer reads version {VERSION}")
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


def _learning_rates(number: int, saved_group: Mapping[str, Any]) -> dict[str, float]:
    rates = {}
    for name in ("lr", "initial_lr"):
        if name in saved_group:
            value = saved_group[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(f"parameter group {number} of the checkpoint has {name} {value!r}")
            rates[name] = value
    if "lr" not in rates or "warmup_steps" not in saved_group:
        raise ValueError(
            f"parameter group {number} of the checkpoint is another optimizer's: it has no lr or no warmup_steps"
        )
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


def _phase_options(saved_group: Mapping[str, Any], config: OptimizerConfig) -> tuple[int, bool]:
    """`warmup_steps` and `came` that the checkpoint was written under: they decide which states it owes."""
    warmup_steps = saved_group.get("warmup_steps", config.warmup_steps)
    came = saved_group.get("came", config.came)
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or not isinstance(came, bool):
        raise ValueError(f"the checkpoint has warmup_steps {warmup_steps!r} and came {came!r}")
    return warmup_steps, came


def _restore_parameter(
    saved: Any,
    p: Tensor,
    saved_options: tuple[int, bool],
    config: OptimizerConfig,
    storage: Callable[[str, Tensor, OptimizerConfig], Storage],
) -> tuple[dict[str, Any], bool]:
    """The new state of one parameter, and whether any of it was kept in another way."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"its state is {type(saved).__name__}, not a dictionary")
    step = _step(saved)
    warmup_steps, came = saved_options
    owed = Phase.at(step, warmup_steps).state_names(came)
    wanted = Phase.at(step, config.warmup_steps).state_names(config.came)
    restored: dict[str, Any] = {"step": step}
    known = {"step", *_DERIVED}
    converted = False
    for name in owed:
        kept = storage_of(name, saved, p.shape)
        if kept is None:
            raise ValueError(f"the state '{name}' is missing, which step {step} of {warmup_steps} warm-up steps has")
        known.update(kept.keys(name))
        if name not in wanted:
            continue
        own = storage(name, p, config)
        value = to_full(name, saved, kept, p.shape) if kept != own or name == "lr_mask" else None
        outside = name == "lr_mask" and _outside(value, config)
        if kept == own and not outside:
            restored.update((key, saved[key].to(p.device, copy=True)) for key in kept.keys(name))
            continue
        assert value is not None
        restored[name] = (value.clamp(config.min_lr, config.max_lr) if outside else value).to(p.device)
        converted |= type(kept) is not type(own)
    for key in saved:
        if key not in known and not key.startswith("momentum_"):  # Those are checked apart.
            raise ValueError(f"the state '{key}' is not one that step {step} of this optimizer has")
    return restored, converted


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
    rows = p.shape[0] if p.ndim else 1
    coded = momentum_storages(periods, rows, p.numel() // rows) if p.numel() else {}
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
            restored.update((key, saved[key].to(p.device, copy=True)) for key in kept.keys(name))
        else:
            restored[name] = to_full(name, saved, kept, p.shape).to(p.device)
            converted = True
    for key in saved:
        if key.startswith("momentum_") and key not in known:
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


def _label(position: int, p: Tensor, names: Mapping[Tensor, str]) -> str:
    name = f" '{names[p]}'" if p in names else ""
    return f"parameter {position}{name} of shape {tuple(p.shape)}"

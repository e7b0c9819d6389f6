"""Writing a checkpoint: torch's own layout, the options, the context, derived values, and checksums of it all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checksum import checksum, tensor_sums
from ..context.driver import Driver
from ..groups import Group, States
from ..sharding import WHOLE, Processes, added_by, processes_of
from ..stacks.stack import SavedTensor, Stack
from ..storage import Spread
from . import sharded
from .layout import VERSION, labels_of, sealed


def complete(
    saved: Mapping[str, Any], groups: Sequence[Group], states: States, names: Mapping[Tensor, str], driver: Driver
) -> dict[str, Any]:
    """What `state_dict()` returns, from what torch's own returns.

    Args:
        saved: torch's own.
        groups: the optimizer's groups.
        states: its states.
        names: the names of parameters whose names are known.
        driver: what drives its learning rates.

    Raises:
        RuntimeError: some processes code the states of a sharded parameter, and others cannot.
    """
    parameters = [p for group in groups for p in group.params]
    processes = processes_of(parameters)
    _check_coded_alike(groups, names, processes)
    derived = _derived_values(groups, states, processes)
    tensors = _saved_tensors(groups, states)
    codes = sharded.saved_codes(tensors)
    checksums = _state_checksums(tensors, states, codes, processes)
    context = driver.saved()
    more: dict[Tensor, dict[str, Any]] = {}
    if processes.shards:
        more = sharded.additions(groups, states, context)
        context = {}
    saved_groups = [
        sealed(
            {
                **saved_group,
                **group.config.as_dict(),
                "lr": float(group.entry["lr"]),
                "initial_lr": group.initial_lr,
                **_names(group, names),
                "state_checksums": [checksums.get(p) for p in group.params],
                **(context if group.number == 0 else {}),
            }
        )
        for group, saved_group in zip(groups, saved["param_groups"])
    ]
    return {
        **saved,
        "state": {
            key: {**state, **codes.get(p, {}), **derived.get(p, {}), **more.get(p, {})}
            for key, state in saved["state"].items()
            for p in [parameters[key]]
        },
        "param_groups": saved_groups,
        "magic_version": VERSION,
    }


def _check_coded_alike(groups: Sequence[Group], names: Mapping[Tensor, str], processes: Processes) -> None:
    """Refuse, on all processes, to save shards of which only some are coded: their tensors are no parts of a whole."""
    if not processes.shards:
        return
    labels = labels_of(groups, names)
    uncoded = [float(p in group.uncoded) for group in groups for p in group.params]
    (counts,) = processes.add_up([torch.tensor(uncoded, device=next(iter(labels)).device)])
    for label, count in zip(labels.values(), counts.tolist()):
        if 0 < count < processes.count():
            raise RuntimeError(
                f"{label}: {count:.0f} of {processes.count()} processes cannot code its states, and say why in their "
                "logs; it can be saved if all of them can, or none"
            )


def _names(group: Group, names: Mapping[Tensor, str]) -> dict[str, list[str]]:
    """The names of a group's parameters, '' if one is not known, as torch's own optimizers save them."""
    written = [names.get(p, "") for p in group.params]
    return {"param_names": written} if any(written) else {}


@torch.no_grad()
def _saved_tensors(groups: Sequence[Group], states: States) -> dict[Stack, dict[str, SavedTensor]]:
    """The tensors of all stacks with states, as they are saved."""
    found = {}
    for group in groups:
        for stack in group.stacks_with_states(states):
            group.bind(stack, states, reading=True)
            found[stack] = stack.saved()
    return found


@torch.no_grad()
def _state_checksums(
    tensors: Mapping[Stack, Mapping[str, SavedTensor]],
    states: States,
    codes: Mapping[Tensor, Mapping[str, Tensor]],
    processes: Processes,
) -> dict[Tensor, int]:
    """For each parameter with a state, the checksum of it; one read-back from the device in all."""
    sums: list[Tensor] = []
    owners: list[tuple[Tensor, str]] = []
    for stack, of_stack in tensors.items():
        for key, saved in of_stack.items():
            sums.append(_sums(stack, saved, processes))
            owners += [(p, key) for p in stack.params]
    if not sums:
        return {}
    (added,) = processes.add_up([torch.cat([values.to(sums[0].device) for values in sums])])
    totals = added.tolist()
    known: dict[Tensor, dict[str, int]] = defaultdict(dict)
    for (p, key), total in zip(owners, totals):
        known[p][key] = total
    return {
        p: checksum({**sharded.without_context(states[p]), **codes.get(p, {})}, totals_of_p)
        for p, totals_of_p in known.items()
    }


def _sums(stack: Stack, saved: SavedTensor, processes: Processes) -> Tensor:
    """What this process adds to the checksums of a stack's tensors of one key, (tensors,) int64."""
    cut = WHOLE if saved.spread is Spread.SAME else stack.cut
    first = 0 if cut is WHOLE else stack.first_row * saved.tensor.shape[2:].numel()
    return added_by(processes, cut, tensor_sums(saved.tensor, first))


@torch.no_grad()
def _derived_values(groups: Sequence[Group], states: States, processes: Processes) -> dict[Tensor, dict[str, Any]]:
    """For each parameter with a state: what `states.DERIVED` lists."""
    derived: dict[Tensor, dict[str, Any]] = {}
    means: list[Tensor] = []
    for group in groups:
        largest = max(float(group.entry["lr"]), group.initial_lr)
        for stack in group.stacks_with_states(states):
            masks, rows = group.mask_and_row_scaling(stack, states)
            shares = masks.sum(dim=(1, 2)).div_(stack.whole_rows * stack.columns)
            means += added_by(processes, stack.cut, shares).unbind()
            parts = () if rows is None else stack.cut.wrapped(rows.unbind(), Spread.BY_ROW, stack.whole_rows)
            for index, p in enumerate(stack.params):
                derived[p] = {"lr_max": largest} if rows is None else {"lr_max": largest, "row_scaling": parts[index]}
    if means:
        (added,) = processes.add_up([torch.stack([mean.to(means[0].device) for mean in means])])
        for p, value in zip(derived, added.tolist()):
            derived[p]["avg_lr"] = value
    return derived

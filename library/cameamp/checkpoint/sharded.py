"""What a checkpoint of sharded parameters has of its own, for torch.distributed.checkpoint.

That reads only what a new optimizer has already, of the same shapes, and in its flat layout only what is in
`optimizer.state`. So there is the context, in pieces, with the first parameter that has a state; all parameters have
the states of the warm-up, also after it; and codes are there row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checksum import tensor_sums
from ..context.memory import HISTORIES, SAMPLES
from ..context.memory import SAVED as CONTEXT
from ..groups import Group, States
from ..phase import Phase
from ..sharding import WHOLE, Processes, Shard, added_by, cut_of
from ..stacks.stack import SavedTensor, Stack
from ..storage.shards import saved_format

_PREFIX = "c_optim_"
_NUMBERS = CONTEXT[1:]


def first_with_state(groups: Sequence[Group], states: States) -> Tensor | None:
    """The parameter that a context is saved with."""
    return next((p for group in groups for p in group.params if "step" in states.get(p, {})), None)


def in_pieces(context: Mapping[str, Any]) -> dict[str, Any]:
    """A saved context as tensors and numbers of one parameter's state; nothing of none."""
    if not context:
        return {}
    pieces = {_PREFIX + name: value for name, value in context[CONTEXT[0]].items()}
    return pieces | {_PREFIX + name: context[name] for name in _NUMBERS}


def without_context(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state, saved or live, without the pieces of a context."""
    return {key: value for key, value in state.items() if not str(key).startswith(_PREFIX)}


def put_together(saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter's saved state without the pieces of a context, and the context; empty if there is none."""
    pieces = {key[len(_PREFIX) :]: value for key, value in saved.items() if str(key).startswith(_PREFIX)}
    rest = without_context(saved)
    if not pieces:
        return rest, {}
    numbers = {name: _number(pieces.pop(name)) for name in _NUMBERS if name in pieces}
    pieces = {name: _local(value) for name, value in pieces.items()}
    history = pieces.get(HISTORIES[-1])
    if isinstance(history, Tensor) and bool(history.isnan().all()):
        # Samples of zeros, which stand for those of the step that there was not yet.
        pieces = {name: value for name, value in pieces.items() if name not in SAMPLES}
    return rest, {CONTEXT[0]: pieces, **numbers}


def additions(groups: Sequence[Group], states: States, context: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """What is saved of each parameter besides its states and what is derived from them."""
    added = {
        p: _states_of_the_warm_up(group, p, states[p])
        for group in groups
        for p in group.params
        if "step" in states.get(p, {}) and cut_of(p) is not WHOLE
    }
    first = first_with_state(groups, states)
    if first is not None:
        pieces = in_pieces(context)
        added.setdefault(first, {}).update(pieces)
        # torch's flat layout keeps what is in the live state.
        states[first].update((key, 0) for key in pieces)
    return added


def saved_codes(tensors: Mapping[Stack, Mapping[str, SavedTensor]]) -> dict[Tensor, dict[str, Tensor]]:
    """For each parameter, of the tensors of its stack: those that are saved in another form than they are held in."""
    found: dict[Tensor, dict[str, Tensor]] = {}
    for stack, of_stack in tensors.items():
        for key, (tensor, spread, is_made) in of_stack.items():
            if is_made:
                for p, part in zip(stack.params, stack.cut.wrapped(tensor.unbind(), spread, stack.whole_rows)):
                    found.setdefault(p, {})[key] = part
    return found


def _states_of_the_warm_up(group: Group, p: Tensor, own: Mapping[str, Any]) -> dict[str, Any]:
    """Zeros for the states of the warm-up that a parameter does not have."""
    found: dict[str, Any] = {}
    cut = cut_of(p)
    _, rows = cut.rows(p.shape)
    for row in group.states(Phase(early=True, warmup=True)):
        shape = torch.Size((rows, *p.shape[1:]))
        code = saved_format(group.format(row, p), shape)
        for key, part in zip(code.keys(row.name), code.parts(shape).values()):
            if row.warmup_only and key not in own:
                # Zeros that take memory: what is saved here may also be what a checkpoint is read into.
                zeros = torch.full(part.shape, part.zero, dtype=part.dtype, device=p.device)
                (found[key],) = cut.wrapped([zeros], part.spread, p.shape[0])
    return found


def own_sum(value: Tensor, processes: Processes) -> Tensor:
    """What this process adds to the checksum of a saved tensor, 0-d int64."""
    cut = cut_of(value)
    (part,) = cut.local([value.detach()])
    first = 0
    if isinstance(cut, Shard) and cut.placements[-1].is_shard():
        first = cut.rows(value.shape)[0] * value.shape[1:].numel()
    else:
        cut = WHOLE
    return added_by(processes, cut, tensor_sums(part.unsqueeze(0), first).squeeze(0))


def _local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value

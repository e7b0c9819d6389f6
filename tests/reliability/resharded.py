"""Checkpoints of shards through torch.distributed.checkpoint: saved by some processes, loaded by others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import library.automagic_cameamp as family
from library.cameamp.phase import Phase
from library.cameamp.states import DERIVED, momentum, to_full
from library.cameamp.storage.blockwise import StoredBlockwise

from .sharded import exact, shard_all, whole


def model_of() -> nn.Module:
    """The model, the same at every call."""
    torch.manual_seed(0)
    wide = nn.Linear(64, 130), nn.Tanh(), nn.Linear(130, 96), nn.Tanh()
    narrow = nn.Linear(96, 4, bias=False), nn.Linear(4, 160, bias=False), nn.Tanh()
    return nn.Sequential(*wide, *narrow, nn.Linear(160, 1, bias=False))


def training(name: str, warmup_steps: int, **options: Any) -> tuple[nn.Module, Any]:
    """A sharded model, whose matrices have codes in 8 bits, and its optimizer."""
    model = shard_all(model_of(), **exact())
    optimizer = getattr(family, name)(model.parameters(), lr=1e-4, warmup_steps=warmup_steps, **options)
    optimizer.set_parameter_names({p: name for name, p in model.named_parameters()})
    return model, optimizer


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    """Steps from `first` on, before `last`; the losses, over all processes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, last):
        x = torch.randn(12, 64, generator=torch.Generator().manual_seed(step))
        mine = x[rank * 12 // ranks : (rank + 1) * 12 // ranks]
        loss = (model(mine.double()) - mine.mean(dim=1, keepdim=True) * 8).square().mean()
        loss.backward()
        family.report_loss(optimizer, loss)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / ranks
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def trained(rank: int, name: str, steps: int, sharded: bool, **options: Any) -> dict[str, Any]:
    """Train, sharded or, in a single process, not.

    Returns:
        The weights, the loss on new batches, the multiplier, and the right factors of momenta that are here.
    """
    if sharded:
        model, optimizer = training(name, steps * 3 // 5, **options)
    else:
        model = model_of()
        optimizer = getattr(family, name)(model.parameters(), lr=1e-4, warmup_steps=steps * 3 // 5, **options)
    train(model if sharded else _InFloat64(model), optimizer, 0, steps)
    weights = {key: whole(p) for key, p in model.named_parameters()}
    fresh = model_of()
    fresh.load_state_dict(weights)
    losses = []
    for number in range(16):
        x = torch.randn(12, 64, generator=torch.Generator().manual_seed(10_000 + number))
        losses.append((fresh(x) - x.mean(dim=1, keepdim=True) * 8).square().mean().item())
    optimizer.state_dict()  # The context takes in the last step with the first message of the next one, or here.
    multiplier = optimizer.c_optim.compute_contextual_lr_multiplier() if hasattr(optimizer, "c_optim") else 1.0
    return {
        "weights": weights,
        "loss": sum(losses) / len(losses),
        "multiplier": multiplier,
        "right factors": _right_factors(optimizer),
    }


def _right_factors(optimizer: Any) -> list[Tensor]:
    states = optimizer.state.values()
    return [value.to_local() for state in states for key, value in state.items() if key.endswith("_q_right")]


def in_other_formats(rank: int) -> dict[str, Any]:
    """Load a checkpoint into momenta that are stored otherwise. Returns their counts, right factors and error."""
    model, optimizer = training("Automagic_CameAMP_COptim", 20, momentum_scales=(1, 3, 4, 5))
    train(model, optimizer, 0, 6)
    other_model, other = training("Automagic_CameAMP_COptim", 20, momentum_scales=(1, 5))
    other.load_state_dict(optimizer.state_dict())
    before, after = everything(model, optimizer), everything(other_model, other)
    key = "0.weight momentum_scale_5"
    value, found = (_decoded(each, "Automagic_CameAMP_COptim")[key] for each in (before, after))
    error = torch.linalg.vector_norm(found - value) / torch.linalg.vector_norm(value)
    ranks = [len(each[f"{key}_q_right"]) for each in (before, after)]
    train(other_model, other, 6, 12)
    counts = [state["momentum_count_5"] for state in other.state.values()]
    return {"ranks": ranks, "error": error.item(), "counts": counts, "right factors": _right_factors(other)}


def uncoded_by_one(rank: int, fused: bool) -> tuple[list[float], str]:
    """Train, and save, while only the last process fails to code, from the third step on. The losses, and the error."""
    model, optimizer = training("Automagic_CameAMP_COptim8bit", 20, fused=fused)
    losses = train(model, optimizer, 0, 2)
    if rank == dist.get_world_size() - 1:
        (group,) = optimizer._groups
        group.leave_uncoded(list(model.parameters()), optimizer.state, "a test")
    losses += train(model, optimizer, 2, 8)
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        return losses, str(error)
    return losses, ""


def whole_into_shards(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Load a full state dict into shards, of which one has its only row on one process. Momenta before and after."""
    found = []
    saved: dict[str, Any] = {}
    for last in (4, 0):
        torch.manual_seed(0)
        model = shard_all(nn.Sequential(nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 1, bias=False)), **exact())
        optimizer = family.Automagic_CameAMP_COptim8bit(model.parameters(), lr=1e-4, momentum_scales=(1, 2, 3))
        train(model, optimizer, 0, last)
        if saved:
            optimizer.load_state_dict(saved)
        saved = optimizer.state_dict()
        states = {
            key: {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            for key, state in saved["state"].items()
        }
        saved = {**saved, "state": states}
        (group,) = optimizer._groups
        found.append(
            [
                to_full(row, states[number], row.format_of(states[number], p.shape, group.config), p.shape)
                for number, p in enumerate(model.parameters())
                for row in map(momentum, (1, 2, 3))
            ]
        )
    return found[0], found[1]


def loaded_uncoded_by_one(rank: int) -> list[float]:
    """Load momenta in other forms, which only the last process fails to code. Returns the losses of training on."""
    model, optimizer = training("Automagic_CameAMP_COptim8bit", 20, momentum_scales=(1, 3, 4, 5))
    train(model, optimizer, 0, 6)
    saved = optimizer.state_dict()
    other_model, other = training("Automagic_CameAMP_COptim8bit", 20, momentum_scales=(1, 5))
    fails = rank == dist.get_world_size() - 1
    with patch.object(StoredBlockwise, "write", _fail) if fails else nullcontext():
        other.load_state_dict(saved)
    return train(other_model, other, 6, 12)


def _fail(*_: Any) -> None:
    raise RuntimeError("a test")


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """How far two sets of weights are apart."""
    return math.sqrt(sum((value - b[name]).square().sum().item() for name, value in a.items()))


class _InFloat64(nn.Module):
    """A model that computes in float64, as `exact` has it of one that is sharded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self._model, {k: p.double() for k, p in self._model.named_parameters()}, (x,))


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """All of the weights, of the states as they are saved, and of the context, by name."""
    found: dict[str, Any] = {}
    states = optimizer.state_dict()["state"]
    for number, (name, p) in enumerate(model.named_parameters()):
        found[name] = whole(p)
        for key, value in states[number].items():
            if not key.startswith("c_optim") and key not in DERIVED:
                found[f"{name} {key}"] = whole(value) if isinstance(value, Tensor) else value
    if hasattr(optimizer, "c_optim"):
        optimizer.state_dict()  # The context takes in the last step with the first message of the next one, or here.
        context = optimizer.c_optim.state_dict()
        found |= {f"context {key}": value for key, value in context.pop("c_optim_context").items()} | context
    return found


def differing(expected: Mapping[str, Any], found: Mapping[str, Any], optimizer: str) -> list[str]:
    """The names of what `everything` found on one number of processes and not on another; codes by their numbers.

    Shards of another size share codes among other rows, so that they are made anew: to within a code of the numbers.
    """
    assert found.keys() == expected.keys()
    names = [key for key in expected if not is_code(key) and not same(expected[key], found[key])]
    numbers, others = (_decoded(each, optimizer) for each in (expected, found))
    for key, value in numbers.items():
        error = torch.linalg.vector_norm(others[key].double() - value.double())
        exact = key.endswith(("lr_mask", "last_polarity"))
        if not error <= (0.0 if exact else 0.02) * torch.linalg.vector_norm(value.double()):
            names.append(key)
    return names


def is_code(key: str) -> bool:
    """Whether a key of `everything` is of a state's codes, or of what belongs to them."""
    return key.endswith(("_q", "_q_scale", "_q_right"))


def _decoded(found: Mapping[str, Any], optimizer: str) -> dict[str, Tensor]:
    """The coded states of what `everything` found, by the parameter's name and the state's."""
    model = model_of()
    (group,) = getattr(family, optimizer)(model.parameters())._groups
    numbers: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        own = {key.removeprefix(f"{name} "): value for key, value in found.items() if key.startswith(f"{name} ")}
        for row in group.states(Phase(early=True, warmup=True)):
            written = row.format_of(own, p.shape, group.config)
            if written is not None and row.name not in own:
                numbers[f"{name} {row.name}"] = to_full(row, own, written, p.shape)
    return numbers


def save(rank: int, folder: str, cases: Sequence[tuple[str, int]], flat: bool, steps: int) -> dict[str, Any]:
    """Train, save, and train on. Returns what there was when it was saved, and at the end."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = {}
    for name, warmup_steps in cases:
        model, optimizer = training(name, warmup_steps)
        train(model, optimizer, 0, steps)
        saved = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.save(saved, checkpoint_id=Path(folder) / f"{name} {warmup_steps}")
        then = everything(model, optimizer)
        losses = train(model, optimizer, steps, 2 * steps)
        found[f"{name} {warmup_steps}"] = {"then": then, "losses": losses, "end": everything(model, optimizer)}
    return found


def load(rank: int, folder: str, cases: Sequence[tuple[str, int]], flat: bool, steps: int) -> dict[str, Any]:
    """Load what `save` saved, and train on. Returns what there was when it was loaded, and at the end."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = {}
    for name, warmup_steps in cases:
        model, optimizer = training(name, warmup_steps)
        saved = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(saved, checkpoint_id=Path(folder) / f"{name} {warmup_steps}")
        set_model_state_dict(model, saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
        then = everything(model, optimizer)
        losses = train(model, optimizer, steps, 2 * steps)
        found[f"{name} {warmup_steps}"] = {"then": then, "losses": losses, "end": everything(model, optimizer)}
    return found


def leave_no_trace(rank: int, name: str) -> dict[str, Any]:
    """Train from the beginning, and after torch has taken the step with which it makes states."""
    found = {}
    for kind in ("straight", "after"):
        model, optimizer = training(name, 8)
        if kind == "after":
            get_optimizer_state_dict(model, optimizer)
            found["steps"] = [state["step"] for state in optimizer.state.values()]
        train(model, optimizer, 0, 6)
        found[kind] = everything(model, optimizer)
    return found


def refuse(rank: int, name: str) -> list[str]:
    """Load a checkpoint of which the last process has damaged its part. Returns the error, and what has changed."""
    model, optimizer = training(name, 8)
    train(model, optimizer, 0, 3)
    saved = get_optimizer_state_dict(model, optimizer)
    before = everything(model, optimizer)
    messages = []
    for damage in ("a bit", "not finite"):
        damaged = {**saved, "state": {key: dict(state) for key, state in saved["state"].items()}}
        state = damaged["state"]["2.weight"]
        key = "exp_avg_res" if "exp_avg_res" in state else "exp_avg_res_q_scale"
        state[key] = state[key].clone()
        if rank == dist.get_world_size() - 1:
            state[key].to_local().flatten()[-1] += 1e-3 if damage == "a bit" else torch.nan
        try:
            set_optimizer_state_dict(model, optimizer, damaged)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    after = everything(model, optimizer)
    assert all(same(before[key], after[key]) for key in before)
    return messages


def in_place(rank: int, folder: str, name: str) -> str:
    """Load what is left if a process dies while torch writes a checkpoint over an older one, in the same files.

    Returns:
        The error.
    """
    model, optimizer = training(name, 20)
    for step in range(2):
        train(model, optimizer, step, step + 1)
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(saved, checkpoint_id=Path(folder) / str(step))
    if rank == 0:
        (Path(folder) / "0" / "__0_0.distcp").replace(Path(folder) / "1" / "__0_0.distcp")
    dist.barrier()
    dcp.load(saved, checkpoint_id=Path(folder) / "1")
    try:
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    except ValueError as error:
        return str(error)
    return ""


def same(a: Any, b: Any) -> bool:
    """Whether two values of `everything` are the same bit for bit."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if a.is_floating_point() else torch.equal(a, b)


def gathered(rank: int, names: Sequence[str], steps: int) -> dict[str, Any]:
    """Train, and give each optimizer's full state dict to the first process, with what was in it."""
    found = {}
    for name in names:
        model, optimizer = training(name, 20)
        train(model, optimizer, 0, steps)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_optimizer_state_dict(model, optimizer, options=options)
        found[name] = {"state_dict": state_dict, "then": everything(model, optimizer)}
    return found


def whole_training(name: str, values: dict[str, Any]) -> tuple[nn.Module, Any]:
    """What `training` gives, not sharded, with the weights of some values of `everything`."""
    model = model_of()
    model.load_state_dict({key: values[key] for key, _ in model.named_parameters()})
    optimizer = getattr(family, name)(model.parameters(), lr=1e-4, warmup_steps=20)
    optimizer.set_parameter_names({p: name for name, p in model.named_parameters()})
    return model, optimizer


def cut_up(rank: int, names: Sequence[str], steps: int) -> dict[str, list[bool]]:
    """Load a checkpoint of whole parameters into shards. Returns of each 32-bit state whether it is the same."""
    found = {}
    for name in names:
        model, optimizer = whole_training(name, {key: p.detach() for key, p in model_of().named_parameters()})
        for step in range(steps):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        sharded_model, sharded = training(name, 20)
        sharded.load_state_dict(optimizer.state_dict())
        found[name] = [
            torch.equal(value, whole(sharded.state[q][key]))
            for p, q in zip(model.parameters(), sharded_model.parameters())
            for key, value in optimizer.state[p].items()
            if isinstance(value, Tensor) and not key.startswith("momentum") and value.is_floating_point()
            if not key.endswith("_q_scale")
        ]
    return found

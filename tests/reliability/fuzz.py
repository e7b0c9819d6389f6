"""Checkpoints under attack: each case loads to exactly what was saved, or is refused and changes nothing."""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import foreign
from .runs import OPTIMIZERS, PHASES, Run, difference, from_bytes, to_bytes

Saved = dict[str, Any]
Damage = Callable[[Saved, random.Random], None]

_NAMES_WHAT = re.compile(r"parameter \d|parameter group \d|the checkpoint")


def fuzz(cases: int, first: int = 0) -> Counter[str]:
    """Run cases `first` to `first + cases - 1`.

    Returns:
        The number of cases by 'kind: outcome'.

    Raises:
        AssertionError: a case did neither; the message has its number.
    """
    outcomes: Counter[str] = Counter()
    for number in range(first, first + cases):
        kind, outcome = one_case(number)
        outcomes[f"{kind}: {outcome}"] += 1
    return outcomes


def one_case(number: int) -> tuple[str, str]:
    """Run one case. The kinds take turns; everything else is drawn from the case's number."""
    rng = random.Random(number)
    kinds = [*IN_MEMORY, *IN_FILES, *FOREIGN]
    kind = kinds[number % len(kinds)]
    source, target = rng.choice(OPTIMIZERS), rng.choice(OPTIMIZERS)
    phase, named = rng.choice(list(PHASES)), rng.random() < 0.7
    where = f"case {number}: {kind}, {source.__name__} to {target.__name__}, {phase}, {'' if named else 'not '}named"
    loader, before = _loader(target, named)
    data = _bytes_of(source, PHASES[phase], named)
    expected = _loaded(source, target, PHASES[phase], named)
    if kind in FOREIGN:
        saved, expected = FOREIGN[kind](loader, rng), None
    elif kind in IN_FILES:
        try:
            saved = from_bytes(IN_FILES[kind](data, rng))
        except Exception:  # torch.load may raise anything; the trainers turn it into one line.
            return kind, "refused by torch.load"
    else:
        saved = from_bytes(data)
        IN_MEMORY[kind](saved, rng)
    try:
        loader.optimizer.load_state_dict(saved)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message, f"{where}: more than one line: {message}"
        assert _NAMES_WHAT.search(message), f"{where}: does not say where: {message}"
        changed = difference(loader.everything(), before)
        assert changed is None, f"{where}: refused, but {changed} has changed"
        return kind, "refused"
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    _loaders.pop((target, named))
    assert expected is not None, f"{where}: was let in"
    changed = difference(loader.everything(), expected)
    assert changed is None, f"{where}: loaded, but {changed} is not what was saved"
    return kind, "loaded as saved"


_loaders: dict[tuple[type[Any], bool], tuple[Run, dict[str, Any]]] = {}


def _loader(target: type[Any], named: bool) -> tuple[Run, dict[str, Any]]:
    """A run after its second step and all that it holds. It is used again as long as checkpoints are refused."""
    if (target, named) not in _loaders:
        run = copy.deepcopy(_second_step(target, named))
        _loaders[target, named] = run, run.everything()
    return _loaders[target, named]


@cache
def _second_step(target: type[Any], named: bool) -> Run:
    return Run(target, named=named).run(2)


@cache
def _all_phases(source: type[Any], named: bool) -> dict[int, bytes]:
    """Checkpoints of one run, by the number of steps taken."""
    run = Run(source, named=named)
    # What a scheduler does: the learning rates are in the checkpoint alone.
    for group in run.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] *= 0.75
    return {
        steps: to_bytes(run.run(steps - run.taken).optimizer.state_dict()) for steps in sorted(PHASES.values())
    }  # fmt: skip


def _bytes_of(source: type[Any], steps: int, named: bool) -> bytes:
    return _all_phases(source, named)[steps]


@cache
def _loaded(source: type[Any], target: type[Any], steps: int, named: bool) -> dict[str, Any]:
    loader = copy.deepcopy(_second_step(target, named))
    loader.optimizer.load_state_dict(from_bytes(_bytes_of(source, steps, named)))
    return loader.everything()


# Damage in memory ----------------------------------------------------------------------------------------------------


def _any_state(saved: Saved, rng: random.Random) -> dict[str, Any]:
    return rng.choice(list(saved["state"].values()))


def _any_tensor(saved: Saved, rng: random.Random, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], str]:
    while True:
        state = _any_state(saved, rng)
        names = [
            name
            for name, value in state.items()
            if isinstance(value, Tensor) and value.numel() and (dtype is None or value.dtype == dtype)
        ]
        if names:
            return state, rng.choice(names)


def _any_group(saved: Saved, rng: random.Random) -> dict[str, Any]:
    return rng.choice(saved["param_groups"])


def _drop_state_key(saved: Saved, rng: random.Random) -> None:
    state = _any_state(saved, rng)
    del state[rng.choice(list(state))]


def _drop_group_key(saved: Saved, rng: random.Random) -> None:
    group = _any_group(saved, rng)
    del group[rng.choice(list(group))]


def _drop_top_key(saved: Saved, rng: random.Random) -> None:
    del saved[rng.choice(list(saved))]


def _drop_parameter(saved: Saved, rng: random.Random) -> None:
    del saved["state"][rng.choice(list(saved["state"]))]


def _add_state_key(saved: Saved, rng: random.Random) -> None:
    state = _any_state(saved, rng)
    name = rng.choice(["momentum_buffer", "max_exp_avg_sq", "exp_avg_q", "s", "last_polarity", "junk", "lr_mask_q"])
    if name not in state:
        state[name] = torch.zeros(3)


def _add_parameter(saved: Saved, rng: random.Random) -> None:
    free = [key for key in (len(saved["state"]) - 1, 7, 77, "d.scale") if key not in saved["state"]]
    saved["state"][rng.choice(free)] = copy.deepcopy(_any_state(saved, rng))


def _change_dtype(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng)
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool, torch.float32]
    state[name] = state[name].to(rng.choice([dtype for dtype in dtypes if dtype != state[name].dtype]))


def _change_shape(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng)
    value = state[name]
    choices = [value.flatten()[:-1], value.unsqueeze(0), torch.cat([value.flatten()] * 2), value.flatten()[:0]]
    state[name] = rng.choice(choices)


def _change_kind(saved: Saved, rng: random.Random) -> None:
    state = _any_state(saved, rng)
    state[rng.choice(list(state))] = rng.choice([None, "text", 0.5, [1, 2], {"a": 1}, True, -1])


def _change_one_bit(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng)
    data = state[name].contiguous().clone()
    pattern = data.view(-1).view(torch.uint8)
    highest = 1 if data.dtype == torch.bool else 8
    pattern[rng.randrange(pattern.numel())] ^= 1 << rng.randrange(highest)
    state[name] = data


def _swap_two_elements(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng)
    flat = state[name].contiguous().clone().view(-1)
    i, j = rng.randrange(flat.numel()), rng.randrange(flat.numel())
    flat[i], flat[j] = flat[j].clone(), flat[i].clone()
    state[name] = flat.view(state[name].shape)


def _not_finite(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng, torch.float32)
    data = state[name].clone()
    data.view(-1)[rng.randrange(data.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    state[name] = data


def _negative(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng, torch.float32)
    state[name] = -state[name].abs() - 1e-9


def _zeros(saved: Saved, rng: random.Random) -> None:
    state, name = _any_tensor(saved, rng)
    state[name] = torch.zeros_like(state[name])


def _change_step(saved: Saved, rng: random.Random) -> None:
    state = _any_state(saved, rng)
    step = state["step"]
    state["step"] = rng.choice([step + 1, step - 1, 0, -step, 10**9, 2**70, float(step), str(step), None, True])


def _change_version(saved: Saved, rng: random.Random) -> None:
    if rng.random() < 0.3:
        saved["magic8_version"] = 2
    saved["magic_version"] = rng.choice([0, 1, 2, 4, -3, "3", None, True, 3.5, [3]])


def _change_groups(saved: Saved, rng: random.Random) -> None:
    groups = saved["param_groups"]
    choice = rng.randrange(6)
    if choice == 0:
        groups.pop()
    elif choice == 1:
        groups.append(copy.deepcopy(groups[0]))
    elif choice == 2:
        groups.reverse()
    elif choice == 3:
        _any_group(saved, rng)["params"].pop()
    elif choice == 4:
        _any_group(saved, rng)["params"].append(99)
    else:
        rng.shuffle(groups[0]["params"])


def _change_option(saved: Saved, rng: random.Random) -> None:
    group = _any_group(saved, rng)
    name = rng.choice(["lr", "initial_lr", "warmup_steps", "came", "betas", "eps", "max_lr", "state_checksums"])
    group[name] = rng.choice([0.5, 7, -1, float("nan"), None, "text", True, (1, 2), [], {}])


def _change_checksum(saved: Saved, rng: random.Random) -> None:
    group = _any_group(saved, rng)
    if rng.random() < 0.5:
        group["group_checksum"] ^= 1 << rng.randrange(63)
    else:
        index = rng.randrange(len(group["state_checksums"]))
        group["state_checksums"] = list(group["state_checksums"])
        group["state_checksums"][index] = (group["state_checksums"][index] or 0) ^ (1 << rng.randrange(63))


def _swap_parameters(saved: Saved, rng: random.Random) -> None:
    """Two parameters of one shape exchange their states; only a checksum can detect it."""
    a, b = rng.choice([(0, 2), (1, 3), (4, 5)])
    states = saved["state"]
    states[a], states[b] = states[b], states[a]


def _swap_one_tensor(saved: Saved, rng: random.Random) -> None:
    a, b = rng.choice([(0, 2), (1, 3), (4, 5)])
    x, y = saved["state"][a], saved["state"][b]
    name = rng.choice([name for name, value in x.items() if isinstance(value, Tensor)])
    x[name], y[name] = y[name], x[name]


def _swap_names(saved: Saved, rng: random.Random) -> None:
    group = _any_group(saved, rng)
    names = group.get("param_names")
    if names:
        names[0], names[1] = names[1], names[0]
    else:
        group["param_names"] = ["x"] * len(group["params"])


def _change_context(saved: Saved, rng: random.Random) -> None:
    """Change a contextual optimizer's context, or add a part of one to another optimizer's checkpoint."""
    group = saved["param_groups"][0]
    name = rng.choice(["c_optim_context", "edge_case_count", "contextual_lr_multiplier"])
    if name not in group or rng.random() < 0.4:
        group[name] = rng.choice([None, "text", -1, 0.123, 7777, True, [1], {}, {"confidence": torch.zeros(())}])
    elif name != "c_optim_context" or rng.random() < 0.2:
        del group[name]
    else:
        context = group[name]
        key = rng.choice(list(context))
        choice = rng.randrange(5)
        if choice == 0:
            del context[key]
        elif choice == 1:
            context["junk"] = torch.zeros(())
        elif choice == 2:
            context[key] = context[key].to(rng.choice([torch.float16, torch.float64, torch.int32]))
        elif choice == 3:
            context[key] = context[key].unsqueeze(0)
        else:
            flat = context[key].clone().reshape(-1)
            flat.view(torch.uint8)[rng.randrange(flat.numel() * flat.element_size())] ^= 1 << rng.randrange(8)
            context[key] = flat.view(context[key].shape)


def _change_momenta(saved: Saved, rng: random.Random) -> None:
    """Change a contextual optimizer's momenta, or add one to another optimizer's state."""
    state = _any_state(saved, rng)
    names = [name for name in state if name.startswith("momentum_")]
    if not names:
        state[rng.choice(["momentum_scale_5", "momentum_count_1"])] = rng.choice([3, torch.zeros(4)])
        return
    name = rng.choice(names)
    if rng.random() < 0.4:
        del state[name]
    elif isinstance(state[name], Tensor):
        state[name] = rng.choice([state[name].double(), state[name].flatten()[1:], 1 + state[name], None])
    else:
        state[name] = rng.choice([state[name] + 1, -1, 10**9, 2**70, 0.5, None, "text"])


def _wreck(saved: Saved, rng: random.Random) -> None:
    place = rng.randrange(5)
    junk = rng.choice([None, [], "text", 3, torch.zeros(2)])
    if place == 0:
        saved["state"] = junk
    elif place == 1:
        saved["param_groups"] = junk
    elif place == 2:
        saved["state"][rng.choice(list(saved["state"]))] = junk
    elif place == 3:
        saved["param_groups"][rng.randrange(2)] = junk
    else:
        _any_group(saved, rng)["params"] = rng.choice([junk, [[1]] * 4, [torch.zeros(1)] * 4, [None] * 4, [0] * 4])


def _nothing(saved: Saved, rng: random.Random) -> None:
    """No damage: the checkpoint must load."""


def _harmless(saved: Saved, rng: random.Random) -> None:
    """Derived values and what other programs have put beside the optimizer's may be anything."""
    _any_state(saved, rng)["avg_lr"] = 17.0
    _any_state(saved, rng).pop("lr_max", None)
    saved["scheduler"] = {"anything": 1}


IN_MEMORY: dict[str, Damage] = {
    "missing state key": _drop_state_key,
    "missing group key": _drop_group_key,
    "missing top key": _drop_top_key,
    "missing parameter": _drop_parameter,
    "extra state key": _add_state_key,
    "extra parameter": _add_parameter,
    "wrong dtype": _change_dtype,
    "wrong shape": _change_shape,
    "wrong kind of value": _change_kind,
    "one bit": _change_one_bit,
    "two elements swapped": _swap_two_elements,
    "not finite": _not_finite,
    "negative": _negative,
    "zeros": _zeros,
    "wrong step": _change_step,
    "wrong version": _change_version,
    "wrong groups": _change_groups,
    "wrong option": _change_option,
    "wrong checksum": _change_checksum,
    "swapped parameters": _swap_parameters,
    "swapped tensors": _swap_one_tensor,
    "swapped names": _swap_names,
    "wrong context": _change_context,
    "wrong momenta": _change_momenta,
    "wrecked": _wreck,
    "nothing": _nothing,
    "harmless": _harmless,
}


# Damage to files -----------------------------------------------------------------------------------------------------


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _flip_one_in_the_pickle(data: bytes, rng: random.Random) -> bytes:
    """The pickle is the first entry of the archive; it holds every number that is not in a tensor."""
    start = data.index(b"data.pkl")
    end = data.index(b"PK\x03\x04", start)
    damaged = bytearray(data)
    damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _blank_block(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = rng.choice([16, 512, 4096])
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


IN_FILES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated file": _truncate,
    "flipped bits in a file": _flip_bits,
    "flipped bit in a file's pickle": _flip_one_in_the_pickle,
    "blanked block in a file": _blank_block,
}


# Checkpoints of others -----------------------------------------------------------------------------------------------


def _damaged_older(run: Run, rng: random.Random) -> Saved:
    """The older 32-bit layout with damage that can be detected without a checksum."""
    saved = foreign.older_32bit(run, rng.choice([3, 6, 11]), rng.choice([torch.float32, torch.bfloat16]))
    state = _any_state(saved, rng)
    choice = rng.randrange(6)
    if choice == 0:
        del state[rng.choice(["lr_mask", "exp_avg", "exp_avg_sq", "exp_avg_res", "step"])]
    elif choice == 1:
        state["exp_avg"].view(-1)[0] = float("nan")
    elif choice == 2:
        state["exp_avg_res"] = state["exp_avg_res"].flatten().repeat(2)
    elif choice == 3:
        state["step"] = "nine"
    elif choice == 4:
        state["last_polarity"] = torch.full_like(state["exp_avg"], 0.5)
        state["step"] = 3
    else:
        state["unknown"] = 1
    return saved


FOREIGN: dict[str, Callable[[Run, random.Random], Saved]] = {
    "torch's AdamW": lambda run, rng: foreign.adamw(run),
    "torch's SGD": lambda run, rng: foreign.sgd_with_momentum(run),
    "bitsandbytes' AdamW8bit": lambda run, rng: foreign.bitsandbytes_adamw8bit(run),
    "ai-toolkit's Automagic": lambda run, rng: foreign.ai_toolkit_automagic(run),
    "older 8-bit layout": lambda run, rng: foreign.older_8bit(run, rng.choice([3, 6, 11])),
    "damaged older layout": _damaged_older,
}

"""Checkpoints that are damaged, mixed up or somebody else's: loaded right, or refused with nothing changed."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from reliability import foreign
from reliability.fuzz import FOREIGN, IN_FILES, IN_MEMORY, fuzz
from reliability.runs import OPTIMIZERS, PHASES, SHAPES, Run, difference, everything, from_bytes, to_bytes

from library.cameamp.checksum import checksum, tensor_sums

each_optimizer = pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda c: c.__name__)

# Of these all three cases are refused; damage of the other kinds, and rarely of these, hits what is derived or changes
# nothing, and what loads is compared bit for bit with what was saved.
REFUSED = (
    "missing parameter", "extra parameter", "wrong shape", "one bit", "not finite", "wrong step", "wrong groups",
    "wrong option", "wrong checksum", "swapped parameters", "swapped names", "wrong context", "wrong momenta",
    "wrecked", "wrong version", *FOREIGN,
)  # fmt: skip


_EACH = 3


def test_fuzz():
    kinds = len(IN_MEMORY) + len(IN_FILES) + len(FOREIGN)
    outcomes = fuzz(_EACH * kinds)
    assert sum(outcomes.values()) == _EACH * kinds
    for kind in REFUSED:
        assert outcomes[f"{kind}: refused"] == _EACH, kind
    for kind in ("nothing", "harmless"):
        assert outcomes[f"{kind}: loaded as saved"] == _EACH, kind


@each_optimizer
def test_a_layout_in_memory_that_only_damage_makes_is_refused_like_any_damage(optimizer_class):
    """A bit of a file may be one of a stride: the tensor is whole then, but its elements stand elsewhere."""
    saved = from_bytes(to_bytes(Run(optimizer_class).run(3).optimizer.state_dict()))
    state = saved["state"][4]
    state["lr_mask"] += 1e-4 * torch.rand(6, 4, 3, 3)
    state["lr_mask"] = state["lr_mask"].as_strided((6, 4, 3, 3), (9, 18, 3, 1))
    with pytest.raises(ValueError, match=r"^parameter 4 'c.weight' of shape \(6, 4, 3, 3\): .* its checksum"):
        Run(optimizer_class).optimizer.load_state_dict(saved)


def test_every_single_bit_counts():
    state = {"step": 3, "exp_avg": torch.randn(4, 5), "last_polarity": torch.rand(4, 5) > 0.5}
    before = checksum(state)
    for name in ("exp_avg", "last_polarity"):
        pattern = state[name].view(torch.uint8).view(-1)
        for index in range(len(pattern)):
            for bit in range(1 if name == "last_polarity" else 8):
                pattern[index] ^= 1 << bit
                assert checksum(state) != before
                pattern[index] ^= 1 << bit
    assert checksum(state) == before


def test_checksums_depend_on_values_alone():
    x = torch.randn(6, 8)
    expected = checksum({"a": x, "b": (1, 2.5)})
    assert checksum({"b": [1, 2.5], "a": x.t().contiguous().t()}) == expected
    assert checksum({"a": x.clone(), "b": [1, 2.5]}) == expected
    assert checksum({"a": x.view(8, 6), "b": [1, 2.5]}) != expected
    assert checksum({"a": x.double(), "b": [1, 2.5]}) != expected
    assert 0 <= expected < 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float64])
def test_a_stack_is_summed_like_its_tensors(dtype, monkeypatch):
    stack = (torch.randn(3, 50, 7) * 50).to(dtype)
    alone = [tensor_sums(x.unsqueeze(0)).item() for x in stack]
    monkeypatch.setattr("library.cameamp.checksum._PART", 100)
    assert tensor_sums(stack).tolist() == alone
    assert alone[0] == sum((2 * i + 1) * int(x) for i, x in enumerate(_patterns(stack[0]))) % 2**64 - 2**64 * (
        alone[0] < 0
    )


def _patterns(x):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.reshape(-1).view(kinds[x.element_size()]).tolist()


@each_optimizer
def test_training_on_in_memory_that_a_checkpoint_shares_is_seen(optimizer_class):
    """torch's state_dict holds the tensors themselves: without a copy, it changes with them."""
    run = Run(optimizer_class).run(5)
    saved = run.optimizer.state_dict()
    run.run(1)
    with pytest.raises(ValueError, match=r"parameter 0 'a.lora_down.weight' .* trained on without a copy"):
        Run(optimizer_class).optimizer.load_state_dict(saved)


@each_optimizer
def test_swapped_states_name_each_other(optimizer_class):
    saved = from_bytes(to_bytes(Run(optimizer_class).run(5).optimizer.state_dict()))
    saved["state"][0], saved["state"][2] = saved["state"][2], saved["state"][0]
    with pytest.raises(
        ValueError, match=r"parameter 0 'a.lora_down.weight' .* the one of parameter 2 'b.lora_down.weight'"
    ):
        Run(optimizer_class).optimizer.load_state_dict(saved)


def reordered(optimizer_class, names):
    """An optimizer whose first and third parameter, of one shape, have traded places, and a checkpoint from before."""
    first, second = Run(optimizer_class).run(5), Run(optimizer_class, named=False)
    second.optimizer.set_parameter_names(dict(zip(second.params, names)))
    return first.optimizer.state_dict(), second.optimizer


@each_optimizer
def test_parameters_in_another_order_are_seen_by_their_names(optimizer_class):
    names = list(SHAPES)
    names[0], names[2] = names[2], names[0]
    saved, optimizer = reordered(optimizer_class, names)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 'b.lora_down.weight' .* has 'a.lora_down.weight' in its place"):
        optimizer.load_state_dict(saved)
    assert difference(everything(optimizer), before) is None


@each_optimizer
def test_another_way_of_naming_is_no_reason_to_refuse(optimizer_class, caplog):
    caplog.set_level(logging.INFO)
    saved, optimizer = reordered(optimizer_class, [f"module.{name}" for name in SHAPES])
    optimizer.load_state_dict(saved)
    assert "names parameters in another way ('a.lora_down.weight')" in caplog.text


# Checkpoints of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOREIGN)
@each_optimizer
def test_others_are_refused_by_name(optimizer_class, kind):
    import random

    run = Run(optimizer_class)
    with pytest.raises(ValueError, match=r"^parameter \d+ '") as raised:
        run.optimizer.load_state_dict(FOREIGN[kind](run, random.Random(0)))
    if "AdamW" in kind or "Automagic" in kind:
        assert "is another optimizer's" in str(raised.value)
    assert len(run.optimizer.state) == 0


@pytest.mark.parametrize("resumed", [False, True], ids=["as saved", "after it was resumed from"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", PHASES)
@each_optimizer
def test_the_older_32_bit_layout_is_read(optimizer_class, phase, dtype, resumed, caplog):
    caplog.set_level(logging.INFO)
    step = PHASES[phase]
    run = Run(optimizer_class, dtype=dtype)
    saved = foreign.older_32bit(run, step, dtype, resumed)
    untouched = copy.deepcopy(saved)
    run.optimizer.load_state_dict(from_bytes(to_bytes(saved)))
    assert "older implementation's, of magic_version 1; its masks and moments are taken over" in caplog.text
    for index, p in enumerate(run.params):
        old, new = saved["state"][index], run.optimizer.state[p]
        assert new["step"] == step
        mask = old["lr_mask"].float()
        bound = 1e-9 if optimizer_class is OPTIMIZERS[0] or p.numel() < 4096 else 2e-2
        assert torch.allclose(run.optimizer.get_lr_mask(p), mask.clamp(1e-7, 1e-2), atol=bound)
        if "exp_avg" in new:
            owed = ["exp_avg", "exp_avg_sq", "exp_avg_res", *(["s"] if phase != "after" else [])]
            for name in owed:
                assert new[name].dtype == torch.float32
                assert torch.equal(new[name], old[name].float()), name
            if phase != "after":
                assert torch.equal(new["last_polarity"], old["last_polarity"].bool())
    run.taken = step
    run.run(3)
    assert difference(flat(saved), flat(untouched)) is None


def flat(saved):
    return {f"{k} {n}": v for k, state in saved["state"].items() for n, v in state.items()}


@each_optimizer
def test_our_own_checkpoint_with_a_damaged_version_is_not_taken_for_an_older_one(optimizer_class):
    saved = Run(optimizer_class).run(3).optimizer.state_dict()
    saved["magic_version"] = 1
    with pytest.raises(ValueError, match="the checkpoint has magic_version 1"):
        Run(optimizer_class).optimizer.load_state_dict(saved)


# torch.distributed.checkpoint ----------------------------------------------------------------------------------------


def model_and_optimizer(optimizer_class, steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    optimizer = optimizer_class(model.parameters(), lr=1e-4, warmup_steps=4)
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def contextual(optimizer):
    return hasattr(optimizer, "c_optim")


def states(optimizer):
    return {name: value for name, value in everything(optimizer).items() if not name.startswith("group")}


@pytest.mark.parametrize("steps", [3, 6])
@each_optimizer
def test_distributed_checkpoint_carries_checksums(optimizer_class, steps):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first, second = model_and_optimizer(optimizer_class, steps), model_and_optimizer(optimizer_class, 0)
    second[0].load_state_dict(first[0].state_dict())
    saved = from_bytes(to_bytes(get_optimizer_state_dict(*first)))
    damaged = copy.deepcopy(saved)
    set_optimizer_state_dict(*second, saved)
    assert difference(states(first[1]), states(second[1])) is None
    damaged["state"]["1.bias"]["exp_avg"][0] += 1e-3
    with pytest.raises(ValueError, match=r"parameter 3 of shape .* does not match its checksum"):
        set_optimizer_state_dict(*second, damaged)
    assert difference(states(first[1]), states(second[1])) is None


@each_optimizer
def test_distributed_checkpoint_in_its_flat_layout(optimizer_class, caplog):
    """It keeps only what a new optimizer has, so neither checksums nor the context; the log says so."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    first, second = model_and_optimizer(optimizer_class, 2), model_and_optimizer(optimizer_class, 0)
    second[0].load_state_dict(first[0].state_dict())
    saved = from_bytes(to_bytes(get_optimizer_state_dict(*first, options=options)))
    caplog.set_level(logging.INFO)
    set_optimizer_state_dict(*second, saved, options=options)
    without = [{n: v for n, v in states(o).items() if not n.startswith("context")} for _, o in (first, second)]
    assert difference(*without) is None
    assert "it carries no checksums" in caplog.text
    assert ("momenta but no context: multiplier and histories start fresh" in caplog.text) == contextual(first[1])

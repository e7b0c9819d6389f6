"""Saving and resuming: bit for bit, any route, and nothing let in that does not fit."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator
from reliability.runs import takes_names, through_torch_save

from library.automagic_cameamp import Automagic_CameAMP

SHAPES = [(4, 24), (24, 4), (4, 6, 3, 3), (12, 4, 1, 1), (5,), (), (4, 24)]
# Breaks in the early phase, on both borders of the late warm-up, and after it; the warm-up is 8 steps long.
BREAKS = [1, 3, 4, 7, 8, 11]
OPTIONS = {"lr": 1e-4, "warmup_steps": 8}


class Training:
    """Parameters, an optimizer and gradients that depend on the step alone."""

    def __init__(self, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
        self.optimizer = Automagic_CameAMP(self.groups(), **{**OPTIONS, **options})
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.taken = 0

    def groups(self):
        return [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 3e-4, "weight_decay": 0.01}]

    def run(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 + self.taken)
            for index, p in enumerate(self.params):
                grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = None if (index + self.taken) % 5 == 0 else grad
            self.optimizer.step()
            self.scheduler.step()
            self.taken += 1
        return self

    def everything(self):
        states = [self.optimizer.state[p] for p in self.params]
        tensors = {f"{i} {name}": value for i, state in enumerate(states) for name, value in state.items()}
        return {**tensors, **{f"{i} weight": p.detach() for i, p in enumerate(self.params)}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = b[name]
        same = (
            torch.equal(value, other) and value.dtype == other.dtype
            if isinstance(value, torch.Tensor)
            else value == other
        )
        assert same, name


def resumed(first, route):
    second = Training(first.params[0].dtype)
    saved = route({
        "weights": [p.detach() for p in first.params],
        "optimizer": first.optimizer.state_dict(),
        "scheduler": first.scheduler.state_dict(),
    })  # fmt: skip
    for p, weight in zip(second.params, saved["weights"]):
        p.data.copy_(weight)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.scheduler.load_state_dict(saved["scheduler"])
    second.taken = first.taken
    return second


@pytest.mark.parametrize("at", BREAKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", [through_torch_save, copy.deepcopy], ids=["torch.save", "deepcopy"])
def test_resuming_is_exact(at, dtype, route):
    straight = Training(dtype).run(14)
    second = resumed(Training(dtype).run(at), route).run(14 - at)
    assert_same(second.everything(), straight.everything())


@pytest.mark.parametrize("at", BREAKS)
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_copying_the_optimizer_itself(at, copier):
    first = Training().run(at)
    second = Training()
    second.params, second.optimizer = copier((first.params, first.optimizer))
    second.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(second.optimizer, 20)
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.taken = at
    assert_same(second.run(14 - at).everything(), first.run(14 - at).everything())


@pytest.mark.parametrize("at", [3, 11])
def test_resuming_through_accelerate(at, tmp_path):
    def prepared():
        training = Training()
        training.model = torch.nn.ParameterList(training.params)
        training.accelerator = Accelerator(cpu=True)
        training.model, wrapped, _ = training.accelerator.prepare(
            training.model, training.optimizer, training.scheduler
        )
        assert wrapped.optimizer is training.optimizer
        return training

    first = prepared().run(at)
    first.accelerator.save_state(str(tmp_path / "state"))
    second = prepared()
    second.accelerator.load_state(str(tmp_path / "state"))
    second.taken = at
    assert_same(second.run(14 - at).everything(), Training().run(14).everything())


def test_accelerate_prepare_is_silent(caplog):
    caplog.set_level(logging.INFO)
    training = Training()
    Accelerator(cpu=True).prepare(training.optimizer)
    assert [r for r in caplog.records if r.name.startswith("library")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_stay_in_32_bits_with_16_bit_weights(dtype):
    second = resumed(Training(dtype).run(3), through_torch_save)
    for state in second.optimizer.state.values():
        assert {value.dtype for value in state.values() if isinstance(value, torch.Tensor)} == {
            torch.float32,
            torch.bool,
        }


def test_contents():
    saved = Training().run(3).optimizer.state_dict()
    assert saved["magic_version"] == 3
    assert set(saved["state"][1]) == {
        "step", "lr_mask", "exp_avg", "exp_avg_sq", "exp_avg_res", "s", "last_polarity", "avg_lr", "lr_max",
    }  # fmt: skip
    state = saved["state"][1]
    assert state["avg_lr"] == pytest.approx(state["lr_mask"].mean().item(), rel=1e-6)
    assert state["lr_max"] == 1e-4
    assert saved["param_groups"][1]["weight_decay"] == 0.01


def test_row_scaling_is_carried_but_not_kept():
    params = [torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.randn(32, 4))]
    optimizer = Automagic_CameAMP(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]["row_scaling"]
    assert torch.allclose(saved, 1 / (params[0].detach().norm(dim=1, keepdim=True) + 0.25).sqrt())
    assert "row_scaling" not in optimizer.state[params[0]]


def test_plain_types_only():
    def check(value):
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, (str, int))
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        else:
            assert value is None or isinstance(value, (torch.Tensor, int, float, str, bool)), type(value)

    check(Training().run(3).optimizer.state_dict())


def test_saved_state_is_not_touched_by_training_on():
    first = Training().run(5)
    saved = copy.deepcopy(first.optimizer.state_dict())
    again = copy.deepcopy(saved)
    second = Training()
    second.optimizer.load_state_dict(saved)
    second.run(9)
    assert_same(
        {f"{k} {n}": v for k, s in saved["state"].items() for n, v in s.items()},
        {f"{k} {n}": v for k, s in again["state"].items() for n, v in s.items()},
    )


def test_other_options_are_the_constructors_and_named(caplog):
    first = Training().run(3)
    first.optimizer.param_groups[0]["lr"] = 7e-5
    saved = first.optimizer.state_dict()
    caplog.set_level(logging.INFO)
    second = Training(eta=1.0, betas=(0.9, 0.99, 0.999))
    second.optimizer.load_state_dict(saved)
    (line,) = [r.message for r in caplog.records if "options differ" in r.message]
    assert "group 0 eta 2.0 -> 1.0" in line
    assert "group 1 betas (0.8, 0.99, 0.999) -> (0.9, 0.99, 0.999)" in line
    assert second.optimizer.param_groups[0]["lr"] == 7e-5
    assert second.optimizer.param_groups[0]["eta"] == 1.0


@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8)], ids=["shorter", "longer"])
def test_other_warm_up(before, after):
    """A shorter warm-up frees what is no longer needed; a longer one starts the sign history afresh."""
    first = Training(warmup_steps=before).run(4)
    second = Training(warmup_steps=after)
    second.optimizer.load_state_dict(through_torch_save(first.optimizer.state_dict()))
    masks = [second.optimizer.get_lr_mask(p) for p in second.params]
    second.taken = 4
    second.run(1)
    for p, mask in zip(second.params, masks):
        if p.grad is None:
            continue
        state = second.optimizer.state[p]
        assert ("s" in state) == ("last_polarity" in state) == (after == 8)
        assert torch.equal(state["lr_mask"], mask)  # No step before the first one of the new history.


def test_masks_outside_other_bounds_are_moved_inside():
    first = Training().run(6)
    second = Training(lr=1e-5, max_lr=5e-5)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert all(second.optimizer.get_lr_mask(p).max() <= 5e-5 for p in second.params[:3])


def damaged(saved, kind):
    state = saved["state"][1]
    if kind == "missing key":
        del state["exp_avg_res"]
    elif kind == "missing warm-up key":
        del state["last_polarity"]
    elif kind == "extra key":
        state["momentum_buffer"] = torch.zeros(24, 4)
    elif kind == "shape":
        state["lr_mask"] = state["lr_mask"].flatten()
    elif kind == "dtype":
        state["exp_avg"] = state["exp_avg"].bfloat16()
    elif kind == "nan":
        state["exp_avg"][0, 0] = float("nan")
    elif kind == "negative":
        state["exp_avg_sq"][0, 0] = -1.0
    elif kind == "step":
        state["step"] = -3
    elif kind == "no tensor":
        state["s"] = 0.5
    elif kind == "no dictionary":
        saved["state"][1] = [1, 2]
    elif kind == "swapped":
        saved["state"][1], saved["state"][2] = saved["state"][2], saved["state"][1]
    elif kind == "unknown parameter":
        saved["state"][77] = state
    elif kind == "groups":
        saved["param_groups"].pop()
    elif kind == "parameters":
        saved["param_groups"][0]["params"].pop()
    elif kind == "lr":
        saved["param_groups"][0]["lr"] = float("inf")
    elif kind == "version":
        saved["magic_version"] = 1
    elif kind == "no state":
        del saved["state"]
    return saved


KINDS = {
    "missing key": "parameter 1 of shape (24, 4): the state 'exp_avg_res' is missing",
    "missing warm-up key": "parameter 1 of shape (24, 4): the state 'last_polarity' is missing",
    "extra key": "parameter 1 of shape (24, 4): the state 'momentum_buffer'",
    "shape": "parameter 1 of shape (24, 4): the state 'lr_mask' has shape (96,)",
    "dtype": "parameter 1 of shape (24, 4): the state 'exp_avg' is torch.bfloat16, not torch.float32",
    "nan": "parameter 1 of shape (24, 4): the state 'exp_avg' has elements that are not finite",
    "negative": "parameter 1 of shape (24, 4): the state 'exp_avg_sq' has negative elements",
    "step": "parameter 1 of shape (24, 4): its step is -3",
    "no tensor": "parameter 1 of shape (24, 4): the state 's' is float, not a tensor",
    "no dictionary": "parameter 1 of shape (24, 4): its state is list, not a dictionary",
    "swapped": "parameter 1 of shape (24, 4): the state 'lr_mask' has shape (4, 6, 3, 3)",
    "unknown parameter": "no group lists: [77]",
    "groups": "1 parameter groups, the optimizer 2",
    "parameters": "parameter group 0 of the checkpoint has 2 parameters, the optimizer's has 3",
    "lr": "parameter group 0 of the checkpoint has lr inf",
    "version": "magic_version 1",
    "no state": "has no 'state'",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind):
    saved = damaged(copy.deepcopy(Training().run(3).optimizer.state_dict()), kind)
    second = Training().run(2)
    before = copy.deepcopy(second.everything())
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in second.optimizer.param_groups])
    with pytest.raises(ValueError) as raised:
        second.optimizer.load_state_dict(saved)
    assert KINDS[kind] in str(raised.value)
    assert_same(second.everything(), before)
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in second.optimizer.param_groups]


def test_another_optimizers_checkpoint_is_refused():
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    other = torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    other.step()
    with pytest.raises(ValueError, match="another optimizer's"):
        Training().optimizer.load_state_dict(other.state_dict())


def test_resuming_with_another_lr_keeps_the_checkpoints():
    """The scheduler's factor is a ratio to the lr that the masks started from, which only the checkpoint knows."""
    p, q = torch.nn.Parameter(torch.randn(6, 6)), torch.nn.Parameter(torch.randn(6, 6))
    first, second = Automagic_CameAMP([p], lr=1e-5), Automagic_CameAMP([q], lr=1e-4)
    p.grad = torch.randn(6, 6)
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_learning_rates() == pytest.approx(first.get_learning_rates())
    assert second.param_groups[0]["lr"] == 1e-5


def test_an_empty_checkpoint_of_another_optimizer_is_refused():
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    other = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.1)
    with pytest.raises(ValueError, match="another optimizer's"):
        Training().optimizer.load_state_dict(other.state_dict())


def test_reading_after_a_longer_warm_up_begins_no_sign_history():
    def run(read):
        second = Training(warmup_steps=100)
        second.optimizer.load_state_dict(Training(warmup_steps=4).run(6).optimizer.state_dict())
        if read:
            second.optimizer.state_dict()
            second.optimizer.get_learning_rates()
        second.taken = 6
        return second.run(2).everything()

    assert_same(run(True), run(False))


def test_numpy_learning_rates_are_saved_as_numbers():
    import numpy

    p = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = Automagic_CameAMP([p], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: numpy.cos(step / 100))
    p.grad = torch.randn(3, 3)
    optimizer.step()
    scheduler.step()
    through_torch_save(optimizer.state_dict())


def test_a_state_that_is_a_tensor_is_refused():
    saved = Training().run(3).optimizer.state_dict()
    saved["state"][1] = torch.ones(3)
    with pytest.raises(ValueError, match="its state is Tensor"):
        Training().optimizer.load_state_dict(saved)


@pytest.mark.skipif(not takes_names(), reason="torch takes named parameters from 2.6 on")
def test_names_appear_in_messages():
    layer = torch.nn.Linear(3, 3)
    optimizer = Automagic_CameAMP(layer.named_parameters())
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = "one"
    with pytest.raises(ValueError, match="parameter 0 'weight' of shape"):
        optimizer.load_state_dict(saved)


def test_hooks_run():
    first, second = Training().run(3), Training()
    calls = []
    second.optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: calls.append("before"))
    second.optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("after"))
    first.optimizer.register_state_dict_post_hook(lambda optimizer, state: calls.append("saved"))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert calls == ["saved", "before", "after"]


def test_a_hook_sees_the_whole_checkpoint_and_may_replace_it():
    def renamed(optimizer, saved):
        state = {f"p{number}": state for number, state in saved["state"].items()}
        return {**saved, "state": state, "seen": sorted(saved), "has_mean": "avg_lr" in saved["state"][0]}

    training = Training().run(3)
    training.optimizer.register_state_dict_post_hook(renamed)
    saved = training.optimizer.state_dict()
    assert (saved["seen"], saved["has_mean"]) == (["magic_version", "param_groups", "state"], True)
    assert "p0" in saved["state"]


def test_distributed_checkpoint_functions():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def training():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))
        return model, Automagic_CameAMP(model.parameters(), **OPTIONS)

    def run(model, optimizer, steps, start=0):
        for number in range(start, start + steps):
            generator = torch.Generator().manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    straight = training()
    run(*straight, 12)
    first, second = training(), training()
    run(*first, 5)
    saved = get_optimizer_state_dict(first[0], first[1])
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(second[0], second[1], saved)
    run(*second, 7, start=5)
    for a, b in zip(straight[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)

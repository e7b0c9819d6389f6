"""Saving and resuming with a context: bit for bit, between all four optimizers, and nothing that does not fit."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator
from reliability.runs import through_torch_save, took_over
from test_checkpoint import assert_same

from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)
from library.cameamp.checkpoint.layout import sealed

# Coded and exact momenta, folded ones, a vector and a number.
SHAPES = [(64, 128), (4, 1280), (12, 8), (5,), ()]
ALL = [Automagic_CameAMP, Automagic_CameAMP8bit, Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit]
CONTEXTUAL = ALL[2:]


class Training:
    """Parameters with gradients and losses that depend on the step alone."""

    def __init__(self, optimizer_class=Automagic_CameAMP_COptim, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in SHAPES]
        own = {"lr": 1e-4, "warmup_steps": 8, "momentum_scales": (1, 2, 3, 7), "context_window": 12, **options}
        self.optimizer = optimizer_class(self.params, **own)
        self.taken = 0

    def run(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 + self.taken)
            for index, p in enumerate(self.params):
                grad = (p.detach().float() + 0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype)
                p.grad = None if index and (index + self.taken) % 5 == 0 else grad
            self.optimizer.report_loss(1 + torch.rand((), generator=generator) + 99 * (self.taken == 11))
            self.optimizer.step()
            self.taken += 1
        return self

    def everything(self):
        states = [self.optimizer.state[p] for p in self.params]
        tensors = {f"{i} {name}": value for i, state in enumerate(states) for name, value in state.items()}
        context = {}
        if hasattr(self.optimizer, "c_optim"):
            saved = self.optimizer.c_optim.state_dict()
            context = {**saved.pop("c_optim_context"), **saved}
            context = {k: v.nan_to_num(-9.0) if isinstance(v, torch.Tensor) else v for k, v in context.items()}
        return {**tensors, **context, **{f"{i} weight": p.detach() for i, p in enumerate(self.params)}}


def resumed(first, optimizer_class, **options):
    return took_over(Training(optimizer_class, first.params[0].dtype, **options), first)


@pytest.mark.parametrize("at", [1, 3, 7, 12, 15])
@pytest.mark.parametrize("optimizer_class", CONTEXTUAL)
def test_resuming_is_exact(optimizer_class, at):
    straight = Training(optimizer_class).run(18)
    assert straight.optimizer.c_optim.edge_case_count > 0
    second = resumed(Training(optimizer_class).run(at), optimizer_class).run(18 - at)
    assert_same(second.everything(), straight.everything())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copying_the_optimizer_itself(copier):
    first, second = Training().run(5), Training()
    second.params, second.optimizer = copier((first.params, first.optimizer))
    second.taken = 5
    assert_same(second.run(9).everything(), first.run(9).everything())


def test_resuming_through_accelerate(tmp_path):
    def prepared():
        training = Training()
        training.model = torch.nn.ParameterList(training.params)
        training.accelerator = Accelerator(cpu=True)
        training.model, _ = training.accelerator.prepare(training.model, training.optimizer)
        return training

    first = prepared().run(6)
    first.accelerator.save_state(str(tmp_path / "state"))
    second = prepared()
    second.accelerator.load_state(str(tmp_path / "state"))
    second.taken = 6
    assert_same(second.run(9).everything(), Training().run(15).everything())


def run(model, optimizer, numbers):
    """Take the steps of these numbers, on gradients and a loss that follow from them."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.report_loss(float(number % 3))
        optimizer.step()


def test_distributed_checkpoint_functions():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def training():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        return model, Automagic_CameAMP_COptim(model.parameters(), lr=1e-4, warmup_steps=8)

    straight, first, second = training(), training(), training()
    run(*straight, range(12))
    run(*first, range(5))
    saved = get_optimizer_state_dict(*first)
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, saved)
    run(*second, range(5, 12))
    for a, b in zip(straight[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)
    assert straight[1].c_optim.loss_history == second[1].c_optim.loss_history


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ALL, ALL)))
def test_any_of_the_four_loads_into_any_other(first, second, caplog):
    caplog.set_level(logging.INFO)
    before = Training(first).run(5)
    after = resumed(before, second)
    text = " ".join(r.message for r in caplog.records if "checkpoint:" in r.message)
    assert ("start fresh" in text) == (first not in CONTEXTUAL and second in CONTEXTUAL)
    assert ("freed" in text) == (first in CONTEXTUAL and second not in CONTEXTUAL)
    assert ("precision" in text) == (("8bit" in first.__name__) != ("8bit" in second.__name__))
    if first in CONTEXTUAL and second in CONTEXTUAL:
        assert after.optimizer.c_optim.loss_history == before.optimizer.c_optim.loss_history
        for p, q in zip(before.params, after.params):
            for name, value in before.optimizer.state[p].items():
                if name.startswith("momentum_"):
                    other = after.optimizer.state[q][name]
                    assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    after.run(6)
    assert all(p.isfinite().all() for p in after.params)
    assert any("momentum_scale" in name for name in after.optimizer.state[after.params[0]]) == (second in CONTEXTUAL)


def test_loading_forgets_what_was_reported_and_keeps_the_context_itself():
    first, second = Training().run(5), Training().run(5)
    context, saved = first.optimizer.c_optim, first.optimizer.state_dict()
    first.optimizer.report_loss(float("nan"))
    first.optimizer.load_state_dict(saved)
    assert first.optimizer.c_optim is context
    assert_same(first.run(2).everything(), second.run(2).everything())


def test_other_scales_keep_what_they_share():
    first = Training().run(5)
    second = resumed(first, Automagic_CameAMP_COptim, momentum_scales=(1, 4, 7)).run(1)
    p, q = first.params[0], second.params[0]
    assert {k for k in second.optimizer.state[q] if "count" in k} == {f"momentum_count_{k}" for k in (1, 4, 7)}
    first.run(1)
    assert torch.equal(first.optimizer.state[p]["momentum_scale_1_q"], second.optimizer.state[q]["momentum_scale_1_q"])


@pytest.mark.parametrize("optimizer_class", CONTEXTUAL)
def test_without_scales_and_back(optimizer_class):
    first = Training(optimizer_class).run(5)
    second = resumed(first, optimizer_class, momentum_scales=()).run(1)
    assert not any("momentum" in name for name in second.optimizer.state[second.params[0]])
    assert second.optimizer.c_optim.loss_history[:5] == first.optimizer.c_optim.loss_history
    third = resumed(second, optimizer_class, momentum_scales=(1, 2)).run(1)
    assert third.optimizer.state[third.params[0]]["momentum_count_1"] == 1


def test_another_window_keeps_the_newest():
    second = resumed(Training().run(9), Automagic_CameAMP_COptim, context_window=4)
    assert second.optimizer.c_optim.loss_history == Training().run(9).optimizer.c_optim.loss_history[-4:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].pop("momentum_scale_1_q"), "the state 'momentum_scale_1_q' is missing"),
        (lambda s: s["state"][0].pop("momentum_count_2"), "the state 'momentum_count_2' is None"),
        (lambda s: s["state"][0].update(momentum_count_2=-1), "the state 'momentum_count_2' is -1"),
        (lambda s: s["state"][0].update(momentum_scale_9=torch.ones(64, 128)), "the state 'momentum_scale_9' is not"),
        (
            lambda s: s["state"][0].update(momentum_scale_7_q=torch.zeros(3, 1, dtype=torch.int8)),
            "'momentum_scale_7_q' has shape (3, 1)",
        ),
        (lambda s: s["param_groups"][0].pop("c_optim_context"), "c_optim_context is NoneType"),
        (lambda s: s["param_groups"][0].pop("edge_case_count"), "edge_case_count is None"),
        (lambda s: s["param_groups"][0].update(contextual_lr_multiplier=0.0), "contextual_lr_multiplier is 0.0"),
        (lambda s: s["param_groups"][0]["c_optim_context"].pop("loss_history"), "'loss_history'"),
    ],
)
def test_damage_is_refused_and_changes_nothing(change, message):
    saved = through_torch_save(Training().run(3).optimizer.state_dict())
    change(saved)
    # Sealed anew, or the checksum would refuse it before anything is looked at.
    saved["param_groups"] = [sealed(group) for group in saved["param_groups"]]
    second = Training().run(2)
    before = copy.deepcopy(second.everything())
    with pytest.raises(ValueError) as raised:
        second.optimizer.load_state_dict(saved)
    assert message in str(raised.value)
    assert_same(second.everything(), before)


def test_a_context_of_an_older_law_starts_afresh_with_one_line(caplog):
    first = Training().run(3)
    saved = through_torch_save(first.optimizer.state_dict())
    context = saved["param_groups"][0]["c_optim_context"]
    context["last_change"] = context.pop("course")
    for name in ("length", "top", "steps"):
        del context[name]
    context.update(alignment_sum=torch.tensor(0.1), alignment_variance=torch.tensor(0.01))
    saved["param_groups"] = [sealed(group) for group in saved["param_groups"]]
    second = Training()
    caplog.set_level(logging.INFO)
    caplog.clear()
    second.optimizer.load_state_dict(saved)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["checkpoint: its multiplier followed another law: multiplier and histories start fresh"]
    assert second.optimizer.c_optim.loss_history == []
    for p, q in zip(first.params, second.params):
        assert torch.equal(first.optimizer.state[p]["exp_avg"], second.optimizer.state[q]["exp_avg"])


def test_contents():
    saved = Training().run(3).optimizer.state_dict()
    group = saved["param_groups"][0]
    assert isinstance(group["contextual_lr_multiplier"], float)
    assert group["edge_case_count"] == 0
    assert set(group["c_optim_context"]) == {
        "loss_history", "gradient_history", "lr_history", "confidence", "alignment", "alignment_square", "length",
        "top", "steps", "last_gradient", "course",
    }  # fmt: skip
    state = saved["state"][2]
    assert {name for name in state if name.startswith("momentum")} == {
        f"momentum_{kind}_{k}" for kind in ("scale", "count") for k in (1, 2, 3, 7)
    }
    assert [state[f"momentum_count_{k}"] for k in (1, 2, 3, 7)] == [3, 1, 1, 0]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("taken", [2, 3, 6], ids=["early", "late warm-up", "after"])
@pytest.mark.parametrize("optimizer_class", ALL)
def test_every_phase_through_a_distributed_checkpoint(optimizer_class, taken, flat, tmp_path):
    """Written to files and read into a new optimizer, for which torch takes a step with lr 0 and no gradients."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def training():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        return model, optimizer_class(model.parameters(), lr=1e-4, warmup_steps=5)

    first, second = training(), training()
    run(*first, range(taken))
    dcp.save({"optimizer": get_optimizer_state_dict(*first, options=options)}, checkpoint_id=tmp_path)
    saved = {"optimizer": get_optimizer_state_dict(*second, options=options)}
    # States of the warm-up are not in checkpoints from after it.
    dcp.load(saved, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, saved["optimizer"], options=options)
    for p, q in zip(first[0].parameters(), second[0].parameters()):
        states = first[1].state[p], second[1].state[q]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]) if torch.is_tensor(value) else value == states[1][name]
    for training_of in (first, second):
        run(*training_of, range(taken, taken + 4))
    exact = not flat or "COptim" not in optimizer_class.__name__  # The flat layout loses the context.
    same = [torch.equal(p, q) for p, q in zip(first[0].parameters(), second[0].parameters())]
    assert all(same) or not exact


@pytest.mark.parametrize("optimizer_class", ALL)
@pytest.mark.parametrize("order", [(1, 0), (1,)], ids=["reordered", "dropped"])
def test_groups_reordered_or_dropped(optimizer_class, order, caplog):
    """As a trainer does it that keeps groups by name: the context is found, or starts afresh with a log line."""
    caplog.set_level(logging.INFO)
    params = [torch.nn.Parameter(torch.randn(64, 96)) for _ in range(4)]
    groups = [params[:2], params[2:]]
    first = optimizer_class([{"params": group} for group in groups], warmup_steps=4)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        first.step()
    saved = first.state_dict()
    numbers = [saved["param_groups"][number]["params"] for number in order]
    saved["param_groups"] = [
        {**saved["param_groups"][number], "params": [2 * place, 2 * place + 1]} for place, number in enumerate(order)
    ]
    saved["state"] = {place: saved["state"][n] for place, n in enumerate(n for pair in numbers for n in pair)}
    second = optimizer_class([{"params": groups[number]} for number in order], warmup_steps=4)
    second.load_state_dict(saved)
    for number in order:
        for p in groups[number]:
            assert first.state[p].keys() == second.state[p].keys()
    if optimizer_class in CONTEXTUAL:
        kept = second.c_optim.gradient_history == first.c_optim.gradient_history
        assert kept == (0 in order)
        assert ("start fresh" in caplog.text) == (0 not in order)

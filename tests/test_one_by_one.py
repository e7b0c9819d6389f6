"""Steps inside the backward pass: each parameter's as soon as its gradient is whole, which is then freed."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from reliability.runs import OPTIMIZERS, PHASES, Run, difference, everything, from_bytes, to_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP_COptim
from library.cameamp import one_by_one
from library.cameamp.step import engine

by_class = pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda c: c.__name__)


def all_of(optimizer):
    """Everything that training depends on, after the step that is under way, if any."""
    optimizer.state_dict()
    return {name: value for name, value in everything(optimizer).items() if not name.endswith("initial_lr")}


def assert_same(one, other):
    assert difference(one, other) is None


def hooked(model, optimizer):
    """Step each parameter in a hook, as trainers do. Returns a list of how many gradients are alive at each step."""
    alive = []
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):

            def hook(p, group=group, index=index):
                alive.append(sum(other.grad is not None for other in model.parameters()))
                optimizer.step_parameter(p, group, index)
                p.grad = None

            parameter.register_post_accumulate_grad_hook(hook)
    return alive


def trained(optimizer_class, steps, after_backward, **options):
    """Weights and states after some steps in hooks; and how many gradients were alive at each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 8))
    optimizer = optimizer_class(model.parameters(), lr=1e-3, warmup_steps=steps // 2, **options)
    alive = hooked(model, optimizer)
    for _ in range(steps):
        loss = model(torch.randn(8, 64)).square().mean()
        optimizer.report_loss(loss)
        loss.backward()
        assert all(p.grad is None for p in model.parameters())
        after_backward(optimizer)
    return all_of(optimizer), alive, model


@by_class
def test_a_step_ends_with_step_or_with_whatever_comes_next(optimizer_class):
    """sd-scripts calls no `step` after a backward pass that stepped."""
    found, alive, _ = trained(optimizer_class, 12, lambda optimizer: optimizer.step())
    assert max(alive) == 1
    assert len(alive) == 12 * 6
    assert_same(found, trained(optimizer_class, 12, lambda optimizer: None)[0])
    assert_same(found, trained(optimizer_class, 12, lambda optimizer: optimizer.state_dict())[0])
    assert_same(found, trained(optimizer_class, 12, copy.deepcopy)[0])


@by_class
def test_gradients_wait_for_one_another(optimizer_class, monkeypatch):
    """Each is the optimizer's as soon as it is given, and fewer elements are alive than the two largest have."""
    monkeypatch.setattr(one_by_one, "_FEW_WAITING", 0)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 8)) for n in (40, *[2] * 8, 9, 3, 1, 30, 5, 2)]
    frozen = [nn.Parameter(torch.randn(n, 8), requires_grad=False) for n in (1, 2) * 4]
    optimizer = optimizer_class([*params[:1], *frozen, *params[1:]])
    (group,) = optimizer.param_groups
    taken, alive = [], {}
    take = one_by_one._take
    monkeypatch.setattr(one_by_one, "_take", lambda group, own, *rest: (taken.append(own), take(group, own, *rest)))

    def hook(p):
        for known in [known for known, gradient in alive.items() if gradient() is None]:
            del alive[known]
        alive[p] = weakref.ref(p.grad)
        assert sum(known.numel() for known in alive) < (40 + 30) * 8
        optimizer.step_parameter(p, group)
        assert p.grad is None

    for p in params:
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        taken.clear()
        sum(p.square().sum() for p in params).backward()
        assert {p for own in taken for p in own} == set(params)
        optimizer.step()
    assert len(taken) == 2
    assert all(optimizer.state[p]["step"] == 3 for p in params)


def test_checkpointing_changes_nothing():
    """With `use_reentrant=True` every segment is a backward pass of its own."""
    found = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        optimizer = Automagic_CameAMP_COptim(layers.parameters(), lr=1e-3)
        hooked(layers, optimizer)
        for _ in range(6):
            x = torch.randn(8, 16, requires_grad=True)
            for layer in layers:
                x = layer(x).tanh() if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant).tanh()
            optimizer.report_loss(loss := x.square().mean())
            loss.backward()
            optimizer.step()
        found.append(all_of(optimizer))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_hooks_and_calls_by_hand_agree():
    in_hooks, by_hand = Run(Automagic_CameAMP_COptim, in_backward=True), Run(Automagic_CameAMP_COptim)
    optimizer, ordinary = by_hand.optimizer, by_hand.optimizer.step

    def step():
        for group in reversed(optimizer.param_groups):
            for index, p in reversed(list(enumerate(group["params"]))):
                optimizer.step_parameter(p, group, index)
        ordinary()

    optimizer.step = step
    for run in (in_hooks, by_hand):
        run.run(12)
    assert_same(all_of(in_hooks.optimizer), all_of(by_hand.optimizer))


class Fails(torch.autograd.Function):
    """The same in the forward pass, and no memory in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_waits_is_dropped_where_a_backward_pass_fails(checkpointed, caplog):
    """As where a trainer goes on with the next batch after it ran out of memory."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    optimizer = Automagic_CameAMP(layers.parameters(), lr=1e-3)
    hooked(layers, optimizer)

    def loss(fails):
        x = torch.randn(4, 8, requires_grad=True)
        for number, layer in enumerate(layers):
            x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            x = Fails.apply(x) if fails and number == 1 else x
        return x.square().mean()

    loss(False).backward()
    optimizer.step()
    before = [p.detach().clone() for p in layers.parameters()]
    with pytest.raises(MemoryError):
        loss(True).backward()
    optimizer.zero_grad()
    assert not optimizer._one_by_one._under_way._waiting.get(optimizer._groups[0])
    loss(False).backward()
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in layers.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(layers.parameters(), before))
    assert "a backward pass failed: 4 gradients that waited for their steps were dropped" in caplog.text


def test_without_losses_the_next_step_of_a_parameter_ends_a_step():
    runs = [Run(Automagic_CameAMP_COptim, in_backward=True) for _ in range(2)]
    runs[1].optimizer.step = lambda: None
    for run in runs:
        run.taken = 4  # From here on all parameters have gradients.
        run.run(6)
    assert_same(*(all_of(run.optimizer) for run in runs))
    assert len(runs[1].optimizer.c_optim.lr_history) == 6


def test_by_either_name_and_with_or_without_a_place():
    found = []
    for step in ("step_parameter", "step_param"):
        run = Run(Automagic_CameAMP)
        for p in run.params:
            p.grad = p.detach() + 1
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                getattr(run.optimizer, step)(p, group)
        run.optimizer.step()
        found.append(all_of(run.optimizer))
    assert_same(*found)


@by_class
def test_the_first_step_of_a_single_parameter_is_the_ordinary_one(optimizer_class):
    found = []
    for in_backward in (False, True):
        p = nn.Parameter(torch.randn(32, 128, generator=torch.Generator().manual_seed(1)))
        optimizer = optimizer_class([p])
        p.grad = p.detach() - 1
        if in_backward:
            optimizer.step_parameter(p, optimizer.param_groups[0], 0)
        optimizer.step()
        found.append({"weight": p.detach(), **{k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v)}})
    assert_same(*found)


@by_class
@pytest.mark.parametrize("phase", PHASES)
def test_resuming_is_bit_for_bit(optimizer_class, phase):
    first = Run(optimizer_class, in_backward=True).run(PHASES[phase])
    second = first.resumed(optimizer_class, in_backward=True)
    for run in (first, second):
        run.run(4)
    assert_same(all_of(first.optimizer), all_of(second.optimizer))


@by_class
@pytest.mark.parametrize("to_backward", [True, False])
def test_a_checkpoint_moves_between_the_modes(optimizer_class, to_backward, caplog):
    first = Run(optimizer_class, in_backward=not to_backward).run(6)
    caplog.clear()
    second = first.resumed(optimizer_class, in_backward=to_backward)
    assert not [record for record in caplog.records if "checkpoint" in record.message]
    before = second.loss()
    second.run(6)
    assert second.loss() < before
    assert all(second.optimizer.state[p]["step"] in (12, 8) for p in second.params)
    magnitudes = ["gradient_magnitudes" in group for group in second.optimizer.param_groups]
    assert magnitudes == [to_backward] * 2


def test_kernels_and_rules_agree(monkeypatch):
    pytest.importorskip("numba", reason="the kernels of CPUs need numba")
    kernels = Run(Automagic_CameAMP, in_backward=True).run(12)
    monkeypatch.setattr(engine, "_AUTOMATIC", set())
    rules = Run(Automagic_CameAMP, in_backward=True).run(12)
    for p, other in zip(kernels.params, rules.params):
        assert torch.allclose(p, other, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, other) or p.numel() < 6


def test_gradients_that_grow_a_thousandfold_keep_their_signs():
    """AGR's sum is of the step before, but at least the parameter's own."""
    p, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = Automagic_CameAMP([p, other], weight_decay=0.0, lr=1e-4)
    for scale in (1.0, 1e3):
        for parameter in (p, other):
            parameter.grad = scale * torch.tensor([1.0, -1.0, 2.0, -2.0])
            optimizer.step_parameter(parameter, optimizer.param_groups[0])
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].sign().tolist() == [1.0, -1.0, 1.0, -1.0]


def test_what_is_left_is_stepped_once():
    run = Run(Automagic_CameAMP)
    for p in run.params:
        p.grad = p.detach() + 1
    group = run.optimizer.param_groups[0]
    run.optimizer.step_parameter(run.params[1], group, 1)  # Its gradient stays.
    run.optimizer.step()
    assert [run.optimizer.state[p]["step"] for p in run.params] == [1] * len(run.params)


def test_losses_of_one_step_are_of_that_step():
    p = nn.Parameter(torch.ones(4))
    optimizer = Automagic_CameAMP_COptim([p])
    for loss in (1.0, 2.0, 3.0):
        optimizer.report_loss(loss)
        optimizer.report_loss(loss + 0.5)  # as with gradient accumulation
        p.grad = torch.randn(4)
        optimizer.step_parameter(p, optimizer.param_groups[0], 0)
    optimizer.step()
    assert optimizer.c_optim.loss_history == [1.25, 2.25, 3.25]


def test_a_closure_may_step():
    p = nn.Parameter(torch.ones(4))
    optimizer = Automagic_CameAMP_COptim([p])

    def closure():
        p.grad = torch.randn(4)
        optimizer.step_parameter(p, optimizer.param_groups[0], 0)
        p.grad = None
        return 2.0

    assert optimizer.step(closure) == 2.0
    assert optimizer.c_optim.loss_history == [2.0]


def test_accelerates_wrapper_is_given_the_method():
    """As the plugin does it, and a fork of musubi-tuner would."""
    from accelerate import Accelerator

    p = nn.Parameter(torch.ones(4))
    optimizer = Accelerator(cpu=True).prepare(Automagic_CameAMP([p]))
    optimizer.step_param = optimizer.optimizer.step_parameter
    p.grad = torch.ones(4)
    optimizer.step_param(p, optimizer.param_groups[0])
    p.grad = None
    optimizer.step()
    assert optimizer.optimizer.state[p]["step"] == 1


def test_memory_is_not_kept_in_stacks_of_several_parameters():
    """A tensor of several parameters' states would stay allocated for the last of them."""
    first = Run(Automagic_CameAMP).run(3)
    second = first.resumed(Automagic_CameAMP, in_backward=True).run(1)
    second.optimizer.effective_learning_rates()
    for p in second.params:
        for value in second.optimizer.state[p].values():
            if torch.is_tensor(value):
                assert value.untyped_storage().nbytes() == value.nbytes


def test_unusable_gradients_are_counted():
    run = Run(Automagic_CameAMP)
    for p in run.params:
        p.grad = torch.full_like(p, torch.nan)
    run.step_parameters()
    run.optimizer.step()
    assert run.optimizer.nonfinite_elements() == sum(p.numel() for p in run.params)


def test_a_parameter_of_another_group_is_refused():
    run = Run(Automagic_CameAMP)
    first, second = run.optimizer.param_groups
    stranger = nn.Parameter(torch.ones(3))
    for p in (*run.params, stranger):
        p.grad = torch.ones_like(p)
    for p, group, index in ((run.params[0], second, 0), (run.params[0], first, 1), (stranger, first, None)):
        with pytest.raises(ValueError, match=r"step_parameter: a parameter of shape \(.*\) is not in the group"):
            run.optimizer.step_parameter(p, group, index)
    with pytest.raises(ValueError, match="is not in the group"):
        run.optimizer.step_parameter(run.params[0], dict(first), 0)
    assert not run.optimizer.state


def test_a_sparse_gradient_is_refused_before_anything_has_changed():
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2).to_sparse()
    optimizer = Automagic_CameAMP([p])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step_parameter(p, optimizer.param_groups[0], 0)
    assert not optimizer.state


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.tensor([1.0, 2.0, torch.nan, 1.0]), torch.ones(4, dtype=torch.float64), [1.0] * 4]
)
def test_damaged_magnitudes_are_seen(value):
    run = Run(Automagic_CameAMP, in_backward=True).run(2)
    saved = from_bytes(to_bytes(run.optimizer.state_dict()))
    saved["param_groups"][0]["gradient_magnitudes"] = value
    with pytest.raises(ValueError, match="parameter group 0 of the checkpoint"):
        Run(Automagic_CameAMP).optimizer.load_state_dict(saved)

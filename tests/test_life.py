"""What happens to an optimizer and its parameters in the course of a training, besides steps."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from reliability.extremes import extreme_steps, long_run
from reliability.runs import OPTIMIZERS, PHASES, Run, difference, everything, from_bytes, states_are_finite, to_bytes
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda c: c.__name__)

STEPS = 12  # Through the warm-up of a run, and beyond.


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_a_file(value):
    """torch.save of the whole object, as some scripts do."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("at", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("copier", [copy.deepcopy, through_pickle, through_a_file])
def test_a_copy_goes_on_alone(optimizer_class, copier, at):
    first = Run(optimizer_class).run(at)
    before = first.everything()
    second = copier(first)
    second.run(3)
    assert difference(first.everything(), before) is None
    first.run(3)
    assert difference(first.everything(), second.everything()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_side_by_side_do_not_know_of_each_other(optimizer_class, dtype):
    alone = Run(optimizer_class, dtype=dtype).run(STEPS)
    together = [Run(optimizer_class, dtype=dtype), *(Run(other, dtype=dtype) for other in OPTIMIZERS)]
    for _ in range(STEPS):
        for run in together:
            run.run(1)
    assert difference(together[0].everything(), alone.everything()) is None
    same = together[1 + OPTIMIZERS.index(optimizer_class)]
    assert difference(same.everything(), alone.everything()) is None


@pytest.mark.parametrize("at", PHASES.values(), ids=PHASES)
def test_a_group_added_in_mid_run(optimizer_class, at):
    run = Run(optimizer_class).run(at)
    plain = copy.deepcopy(run)
    late = torch.nn.Parameter(torch.randn(64, 64))
    run.optimizer.add_param_group({"params": [late], "lr": 2e-4, "weight_decay": 0.0})
    run.params.append(late)
    run.targets.append(torch.zeros(64, 64))
    start = late.detach().square().sum()
    run.run(5)
    plain.run(5)
    assert run.optimizer.state[late]["step"] == 5
    assert late.detach().square().sum() < start
    assert run.optimizer.state[run.params[0]]["step"] == at + 5
    if not hasattr(run.optimizer, "c_optim"):  # A context looks at all groups together.
        assert all(torch.equal(p, q) for p, q in zip(run.params, plain.params))
    assert states_are_finite(run.optimizer)
    fresh = Run(optimizer_class)
    other = torch.nn.Parameter(late.detach().clone())
    with pytest.raises(ValueError, match="the checkpoint has 3 parameter groups, the optimizer 2"):
        fresh.optimizer.load_state_dict(run.optimizer.state_dict())
    fresh.optimizer.add_param_group({"params": [other], "lr": 2e-4, "weight_decay": 0.0})
    fresh.optimizer.load_state_dict(from_bytes(to_bytes(run.optimizer.state_dict())))
    assert fresh.optimizer.state[other]["step"] == 5


class Net(torch.nn.Module):
    """A small model with two layers and one that may share the first one's weight."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, bias=False)
        self.third = torch.nn.Linear(64, 64)
        if tied:
            self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(torch.tanh(self.second(self.first(x))))


def train(model, optimizer, steps, first=0, after=lambda: None, set_to_none=True):
    """Steps of a regression, the same at every number."""
    for step in range(first, first + steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        dtype = model.first.weight.dtype
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = distance(model(x.to(dtype)), x)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        after()


def distance(y, x):
    return (y.float() - x.flip(1)).square().mean()


@torch.no_grad()
def loss_of(model):
    """The loss where `train` looks, of all its steps together."""
    x = torch.cat([torch.randn(8, 64, generator=torch.Generator().manual_seed(step)) for step in range(24)])
    return distance(model(x), x).item()


def built(optimizer_class, **options):
    model = Net(**options)
    return model, optimizer_class(model.parameters(), lr=1e-3, max_lr=1e-2, warmup_steps=8)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("at", PHASES.values(), ids=PHASES)
def test_parameters_frozen_and_thawed(optimizer_class, at):
    model, optimizer = built(optimizer_class)
    train(model, optimizer, at)
    weight = model.second.weight
    frozen = {"weight": weight.detach().clone(), **copy.deepcopy(optimizer.state[weight])}
    weight.requires_grad_(False)
    train(model, optimizer, 3, at)
    assert difference({"weight": weight.detach(), **optimizer.state[weight]}, frozen) is None
    saved = from_bytes(to_bytes(optimizer.state_dict()))
    other_model, other = built(optimizer_class)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    weight.requires_grad_(True)
    train(model, optimizer, 3, at + 3)
    train(other_model, other, 3, at + 3)
    assert optimizer.state[weight]["step"] == at + 3
    assert optimizer.state[model.first.weight]["step"] == at + 6
    assert not torch.equal(weight, frozen["weight"])
    assert difference(weights(model), weights(other_model)) is None


def test_everything_frozen(optimizer_class):
    model, optimizer = built(optimizer_class)
    train(model, optimizer, 2)
    model.requires_grad_(False)
    before = weights(model)
    train(model, optimizer, 3, 2)
    assert difference(weights(model), before) is None
    model.requires_grad_(True)
    train(model, optimizer, 3, 5)
    assert optimizer.state[model.first.weight]["step"] == 5


def test_a_first_step_without_any_gradient_says_so(optimizer_class):
    """As when a wrapper has replaced the model's parameters since the optimizer was built."""
    model, optimizer = built(optimizer_class)
    before = weights(model)
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient at its first step"):
        optimizer.step()
    assert difference(weights(model), before) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
        optimizer.zero_grad()
        optimizer.step()
        frozen_model, frozen = built(optimizer_class)
        frozen_model.requires_grad_(False)
        frozen.step()


def test_tied_parameters_are_one(optimizer_class):
    model, optimizer = built(optimizer_class, tied=True)
    before = loss_of(model)
    train(model, optimizer, STEPS)
    assert model.third.weight is model.first.weight
    assert len(optimizer.state) == len(list(model.parameters())) == 4
    assert loss_of(model) < before
    other_model, other = built(optimizer_class, tied=True)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(from_bytes(to_bytes(optimizer.state_dict())))
    train(model, optimizer, 2, STEPS)
    train(other_model, other, 2, STEPS)
    assert difference(weights(model), weights(other_model)) is None


def test_replaced_data(optimizer_class):
    """New memory under the same parameters, as moving a model and some adapters' merging do it."""
    model, optimizer = built(optimizer_class)
    plain_model, plain = built(optimizer_class)

    def replace():
        for p in model.parameters():
            p.data = p.data.clone()

    train(model, optimizer, STEPS, after=replace)
    train(plain_model, plain, STEPS)
    assert difference(weights(model), weights(plain_model)) is None


@pytest.mark.parametrize("at", PHASES.values(), ids=PHASES)
def test_a_model_moved_to_another_dtype_and_back(optimizer_class, at):
    model, optimizer = built(optimizer_class)
    before = loss_of(model)
    train(model, optimizer, at)
    kinds = {name: value.dtype for name, value in optimizer.state[model.first.weight].items() if torch.is_tensor(value)}
    model.to(torch.bfloat16)
    train(model, optimizer, 1, at)
    now = {name: value.dtype for name, value in optimizer.state[model.first.weight].items() if torch.is_tensor(value)}
    assert all(now[name] == kinds[name] for name in kinds.keys() & now.keys())
    assert model.first.weight.dtype == torch.bfloat16
    train(model, optimizer, 4, at + 1)
    model.to(torch.float32)
    train(model, optimizer, 4, at + 5)
    assert loss_of(model) < before
    assert optimizer.state[model.first.weight]["step"] == at + 9
    assert states_are_finite(optimizer)


@pytest.mark.parametrize("at", PHASES.values(), ids=PHASES)
def test_a_model_moved_to_another_device(optimizer_class, at):
    """The meta device computes no values, but like any other it refuses an operation on tensors of two devices."""
    model, optimizer = built(optimizer_class)
    train(model, optimizer, at)
    optimizer.zero_grad()
    for p in model.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().to("meta")))
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    weight = model.first.weight
    states = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    assert states
    assert {value.device.type for value in (weight, *states)} == {"meta"}
    assert optimizer.state[weight]["step"] == at + 10


def test_zero_grad_either_way(optimizer_class):
    results = []
    for set_to_none in (True, False):
        model, optimizer = built(optimizer_class)
        train(model, optimizer, STEPS, set_to_none=set_to_none)
        results.append(weights(model))
    assert difference(*results) is None


def test_averaged_models(optimizer_class):
    """They copy the model, and an average of weights may take its place in mid-run."""
    model, optimizer = built(optimizer_class)
    plain_model, plain = built(optimizer_class)
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))]
    train(model, optimizer, STEPS, after=lambda: [average.update_parameters(model) for average in averages])
    train(plain_model, plain, STEPS)
    assert difference(weights(model), weights(plain_model)) is None
    assert not torch.equal(averages[1].module.first.weight, model.first.weight)
    model.load_state_dict(averages[1].module.state_dict())
    before = loss_of(model)
    train(model, optimizer, 3, STEPS)
    assert loss_of(model) < before < loss_of(Net())
    assert states_are_finite(optimizer)


class PlaceInGroups(lr_scheduler.LRScheduler):
    """Keeps its place in the groups of the optimizer, as schedulers of LoRA_Easy_Training_Scripts do."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["current_cycle_step"] = (group.get("current_cycle_step", -1) + 1) % 5
        return [group["initial_lr"] * 0.7 ** group["current_cycle_step"] for group in self.optimizer.param_groups]


SCHEDULERS = {
    "PlaceInGroups": PlaceInGroups,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.CosineAnnealingLR(o, 10)], [3]
    ),
}
OF_TRANSFORMERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt")


def scheduled(name, optimizer):
    if name in SCHEDULERS:
        return SCHEDULERS[name](optimizer)
    transformers = pytest.importorskip("transformers")
    return transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)


@pytest.mark.parametrize("name", [*SCHEDULERS, *OF_TRANSFORMERS])
def test_schedulers(optimizer_class, name):
    """They set the rates that they set for torch's optimizers, and resuming with them is exact."""

    def begin():
        p = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        optimizer = optimizer_class([p], lr=1e-3, max_lr=1e-2, warmup_steps=6)
        return p, optimizer, scheduled(name, optimizer)

    def go_on(p, optimizer, scheduler, steps):
        for number in steps:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    p, optimizer, scheduler = first = begin()
    twin = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-3)
    twins_scheduler = scheduled(name, twin)
    for number in range(9):
        go_on(*first, [number])
        twin.step()
        twins_scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(twin.param_groups[0]["lr"], rel=1e-12)
    (group,), (rate,) = optimizer.param_groups, optimizer.get_learning_rates()
    group["lr"] *= 0.5
    assert optimizer.get_learning_rates() == [pytest.approx(rate * 0.5)]
    group["lr"] *= 2
    second = begin()
    second[0].data.copy_(p.data)
    second[1].load_state_dict(from_bytes(to_bytes(optimizer.state_dict())))
    second[2].load_state_dict(copy.deepcopy(scheduler.state_dict()))
    go_on(*first, range(9, 12))
    go_on(*second, range(9, 12))
    assert torch.equal(first[0], second[0])


def test_a_step_that_the_grad_scaler_skips(optimizer_class):
    model, optimizer = built(optimizer_class)
    train(model, optimizer, 3)
    before = {**weights(model), **everything(optimizer)}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, steps in ((float("inf"), 3), (1.0, 4)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.second.weight.grad[1, 2] = value
        scaler.scale(torch.ones(()))  # Its scale is made here.
        scaler.step(optimizer)
        scaler.update()
        after = {**weights(model), **everything(optimizer)}
        assert (difference(after, before) is None) == (steps == 3)
        assert optimizer.state[model.first.weight]["step"] == steps
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("seed", range(4))
def test_gradients_and_options_at_their_extremes(optimizer_class, seed):
    assert extreme_steps(optimizer_class, 24, seed) > 0


def test_memory_is_flat(optimizer_class):
    """No step keeps anything once the warm-up is over."""
    looks = long_run(optimizer_class, 90, every=30, warmup_steps=20)
    assert looks[-1][2] == looks[0][2]


OFFLOADED = {
    "every state": lambda optimizer: [v for state in optimizer.state.values() for v in state.values()],
    "of some parameters": lambda optimizer: [
        v for state in list(optimizer.state.values())[::2] for v in state.values()
    ],
    "of its state_dict": lambda optimizer: [v for s in optimizer.state_dict()["state"].values() for v in s.values()],
}


@pytest.mark.parametrize("at", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("which", OFFLOADED)
def test_states_given_other_memory(optimizer_class, which, at):
    """`v.data = ...`, as recipes do it that send an optimizer to another device and back."""
    run, plain = Run(optimizer_class).run(at), Run(optimizer_class).run(at)
    for _ in range(3):
        states = [value for value in OFFLOADED[which](run.optimizer) if torch.is_tensor(value)]
        assert states
        for value in states:
            value.data = value.data.clone()
        run.run(1)
        plain.run(1)
    assert difference(run.everything(), plain.everything()) is None
    for each in (run, plain):
        each.optimizer.load_state_dict(each.optimizer.state_dict())
    assert difference(run.run(2).everything(), plain.run(2).everything()) is None


def test_memory_that_states_have_left_is_free(optimizer_class):
    run = Run(optimizer_class).run(3)
    for p in run.params:
        for value in run.optimizer.state[p].values():
            if torch.is_tensor(value):
                value.data = value.data.clone()
    del value  # Slices know the tensor that they were made of.
    left = [weakref.ref(tensor) for stack in stacks_of(run.optimizer) for tensor in stack._tensors.values()]
    run.run(1)
    assert left
    assert all(tensor() is None for tensor in left)


def stacks_of(optimizer):
    return [stack for group in optimizer._groups for stack in group.stacks_with_states(optimizer.state)]


def test_a_rate_may_be_a_tensor(optimizer_class):
    """In the constructor, in a group, under a scheduler, and through a checkpoint: it stays the same tensor."""
    run, plain = Run(optimizer_class, lr=torch.tensor(1e-3)), Run(optimizer_class)
    own = torch.tensor([5e-4], dtype=torch.float64)
    run.optimizer.param_groups[1]["lr"] = own
    rate = run.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    schedulers = [lr_scheduler.LambdaLR(each.optimizer, lambda step: 1 / (1 + step)) for each in (run, plain)]
    for _ in range(STEPS):
        for each, scheduler in zip((run, plain), schedulers):
            each.run(1)
            scheduler.step()
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(run.params, plain.params))
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert run.optimizer.param_groups[1]["lr"] is own
    assert rate.item() == pytest.approx(plain.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("rate", [np.float32(1e-4), np.array(1e-4), torch.tensor([1e-4])], ids=repr)
def test_rates_of_one_element(optimizer_class, rate):
    optimizer = optimizer_class([{"params": [torch.nn.Parameter(torch.ones(3))], "lr": rate}], lr=rate)
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.config.lr == pytest.approx(1e-4)
    assert optimizer.get_learning_rates() == [pytest.approx(1e-4)]

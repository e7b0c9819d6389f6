"""Parameter groups: their own options, learning rates, schedulers, and what is reported of them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP_COptim


def matrix(rows=6, columns=5):
    return torch.nn.Parameter(torch.randn(rows, columns))


def step(optimizer, count=1):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_params_may_be_any_iterable():
    named = {"a": matrix(), "b": matrix()}
    optimizer = Automagic_CameAMP([{"params": named.values()}, {"params": iter([matrix()])}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


def test_group_lr_above_max_lr_raises_its_bound(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = Automagic_CameAMP([{"params": [matrix()]}, {"params": [matrix()], "lr": 5e-3}], lr=1e-3)
    assert "parameter group 1: max_lr is raised" in caplog.text
    assert [group["max_lr"] for group in optimizer.param_groups] == [1e-3, 5e-3]
    step(optimizer, 3)
    assert optimizer.get_lr_mask(optimizer.param_groups[1]["params"][0]).min() > 4e-3


def test_group_lr_of_zero_freezes_it():
    frozen, free = matrix(), matrix()
    before = frozen.detach().clone()
    optimizer = Automagic_CameAMP([{"params": [frozen], "lr": 0}, {"params": [free]}], lr=1e-4)
    step(optimizer, 5)
    assert torch.equal(frozen, before)
    assert optimizer.get_learning_rates()[0] == 0.0
    assert not torch.equal(free, before)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": 1e-9}, "parameter group 1: option 'lr' is 1e-09"),
        ({"lr": -1e-5}, "parameter group 1: option 'lr'"),
        ({"lr": "high"}, "parameter group 1: option 'lr' is 'high'"),
        ({"lr": True}, "parameter group 1: option 'lr' is True"),
        ({"lr": 2.0, "max_lr": True}, "parameter group 1: option 'max_lr' is True"),
        ({"lr": 0, "min_lr": "low"}, "parameter group 1: option 'min_lr' is 'low'"),
        ({"max_lr": 5e-7}, "parameter group 1: option 'lr' is 1e-06"),
        ({"betas": (0.9, 0.99)}, "parameter group 1: option 'betas'"),
        ({"weigth_decay": 0.1}, "parameter group 1: unknown option 'weigth_decay', did you mean 'weight_decay'"),
    ],
)
def test_mistakes_in_a_group_name_it_and_add_nothing(group, message):
    optimizer = Automagic_CameAMP([matrix()])
    with pytest.raises((TypeError, ValueError)) as raised:
        optimizer.add_param_group({"params": [matrix()], **group})
    assert message in str(raised.value)
    assert len(optimizer.param_groups) == 1
    step(optimizer)


def test_a_group_that_is_no_dictionary_is_refused():
    optimizer = Automagic_CameAMP([matrix()])
    with pytest.raises(TypeError, match="parameter group 1: it is a list; allowed: a dictionary"):
        optimizer.add_param_group([matrix()])


def test_numbers_of_numpy_are_numbers():
    optimizer = Automagic_CameAMP([{"params": [matrix()], "lr": np.float32(2**-7)}])
    assert optimizer.param_groups[0]["max_lr"] == 2**-7
    frozen = matrix()
    before = frozen.detach().clone()
    step(Automagic_CameAMP([{"params": [frozen], "lr": np.float32(0)}]), 2)
    assert torch.equal(frozen, before)
    Automagic_CameAMP_COptim([matrix()]).report_loss(np.float32(1.0))


def test_a_parameter_listed_twice_is_refused():
    p = matrix()
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="group 0: lists a parameter"):
        Automagic_CameAMP([p, p])
    optimizer = Automagic_CameAMP([p])
    other = matrix()
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="group 1: lists a parameter"):
        optimizer.add_param_group({"params": [other, other]})
    assert len(optimizer.param_groups) == 1
    step(optimizer)


def test_groups_may_carry_labels():
    optimizer = Automagic_CameAMP([{"params": [matrix()], "name": "unet", "block": 3}])
    assert optimizer.param_groups[0]["name"] == "unet"


def test_group_added_in_mid_run():
    optimizer = Automagic_CameAMP([matrix()], lr=1e-4)
    step(optimizer, 3)
    late = matrix()
    optimizer.add_param_group({"params": [late], "lr": 1e-5})
    step(optimizer, 2)
    assert optimizer.state[late]["step"] == 2
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 5


def test_one_cycle_scheduler_cannot_change_the_bounds():
    """It writes max_lr, min_lr and betas of its own into the groups."""

    def run(clobber):
        torch.manual_seed(3)
        optimizer = Automagic_CameAMP([matrix()], lr=1e-4, warmup_steps=4)
        for _ in range(8):
            if clobber:
                optimizer.param_groups[0].update(min_lr=0.5, max_lr=0.9, betas=(0.1, 0.1, 0.1), warmup_steps=99)
            step(optimizer)
        return optimizer.param_groups[0]["params"][0].detach()

    assert torch.equal(run(False), run(True))


def test_real_one_cycle_scheduler():
    p = matrix()
    optimizer = Automagic_CameAMP([p], lr=1e-4, warmup_steps=5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=20)
    initial = optimizer.param_groups[0]["initial_lr"]
    for _ in range(10):
        step(optimizer)
        scheduler.step()
    mask = optimizer.state[p]["lr_mask"]
    assert ((mask - initial).abs() <= 4 * 3e-6 + 1e-9).all()  # four bumps around the scheduler's initial lr
    factor = optimizer.param_groups[0]["lr"] / initial
    assert optimizer.get_learning_rates()[0] == pytest.approx(mask.mean().item() * factor, rel=1e-5)
    assert optimizer.state_dict()["param_groups"][0]["max_lr"] == 1e-3
    assert optimizer.state_dict()["param_groups"][0]["betas"] == (0.8, 0.99, 0.999)


def test_mask_starts_at_initial_lr_under_a_warm_up_scheduler():
    p = matrix()
    optimizer = Automagic_CameAMP([p], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    before = p.detach().clone()
    step(optimizer)
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["lr_mask"], torch.full_like(p, 1e-4))
    scheduler.step()
    step(optimizer)
    assert not torch.equal(p, before)


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3, dtype=torch.float64)], ids=["number", "tensor"])
def test_a_scheduler_treats_groups_one_by_one(lr):
    """torch gives groups without a rate of their own the constructor's tensor itself, into which schedulers write."""
    optimizer = Automagic_CameAMP([{"params": [matrix()]}, {"params": [matrix()]}], lr=lr)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.0])
    assert [float(group["lr"]) for group in optimizer.param_groups] == [1e-3, 0.0]
    optimizer = Automagic_CameAMP([{"params": [matrix()]}, {"params": [matrix()]}], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [5e-4, 5e-4]


def test_a_parameter_added_by_hand_is_refused_before_anything_moves():
    p, late = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Automagic_CameAMP([p])
    p.grad, late.grad = torch.ones(4, 4), torch.ones(4, 4)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["params"].append(late)
    with pytest.raises(RuntimeError, match="add groups by add_param_group"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


def test_reported_learning_rates():
    plain = torch.nn.Parameter(torch.randn(7))
    optimizer = Automagic_CameAMP([{"params": [plain]}, {"params": [matrix()], "lr": 2e-4}], lr=1e-4)
    assert optimizer.get_learning_rates() == [1e-4, 2e-4]
    step(optimizer, 4)
    first, second = optimizer.param_groups
    masks = [optimizer.state[group["params"][0]]["lr_mask"] for group in optimizer.param_groups]
    assert optimizer._get_group_lr(first) == pytest.approx(masks[0].mean().item())
    assert optimizer.get_learning_rates() == [optimizer._get_group_lr(first), optimizer._get_group_lr(second)]
    assert optimizer.get_avg_learning_rate() == pytest.approx(sum(optimizer.get_learning_rates()) / 2)
    mean, smallest, largest = optimizer.effective_learning_rates()[0]
    assert (smallest, largest) == (masks[0].min().item(), masks[0].max().item())
    assert isinstance(optimizer._get_group_lr(first), float)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer._get_group_lr(dict(first))
    assert mean == pytest.approx(masks[0].mean().item())


def test_reported_learning_rate_includes_row_scaling():
    down, up = torch.nn.Parameter(torch.randn(2, 9)), torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = Automagic_CameAMP([down, up], lr=1e-4, warmup_steps=0)
    step(optimizer)
    expected = [1e-4 / (p.detach().norm(dim=1) + 0.25).sqrt() for p in (down, up)]
    elements = torch.cat([rows.repeat_interleave(p.shape[1]) for rows, p in zip(expected, (down, up))])
    assert optimizer.get_learning_rates()[0] == pytest.approx(elements.mean().item(), rel=1e-5)


def test_asking_does_not_change_training():
    def run(ask):
        torch.manual_seed(5)
        optimizer = Automagic_CameAMP([matrix(), matrix(2, 9), matrix()], lr=1e-4, warmup_steps=6)
        for _ in range(10):
            step(optimizer)
            if ask:
                optimizer.get_learning_rates()
                optimizer.state_dict()
                optimizer.nonfinite_elements()
                for p in optimizer.param_groups[0]["params"]:
                    optimizer.get_lr_mask(p).zero_()
        return [p.detach() for p in optimizer.param_groups[0]["params"]]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True)))


def test_get_lr_mask():
    p, other = matrix(), matrix()
    optimizer = Automagic_CameAMP([p], lr=1e-4)
    assert torch.equal(optimizer.get_lr_mask(p), torch.full_like(p, 1e-4))
    step(optimizer, 3)
    assert torch.equal(optimizer.get_lr_mask(p), optimizer.state[p]["lr_mask"])
    with pytest.raises(ValueError, match="not one of this optimizer's"):
        optimizer.get_lr_mask(other)


def test_verbose_logs_and_never_prints(caplog, capsys):
    caplog.set_level(logging.INFO)
    optimizer = Automagic_CameAMP([matrix()], verbose=True, warmup_steps=50)
    step(optimizer, 100)
    assert "step 100: after the warm-up" in caplog.text
    assert capsys.readouterr().out == ""


def test_groups_removed_by_hand_are_refused():
    optimizer = Automagic_CameAMP([{"params": [matrix()]}, {"params": [matrix()]}])
    optimizer.param_groups.pop(0)
    with pytest.raises(RuntimeError, match="param_groups"):
        step(optimizer)


@pytest.mark.parametrize(
    ("module", "name"),
    [("optimum.quanto.tensor.weights.qbytes", "WeightQBytesTensor"), ("torchao.quantization", "Int8Tensor")],
)
def test_quantized_weights_cannot_be_trained(module, name):
    """Their classes are recognized by where they are defined: the packages need not be installed."""
    kind = type(name, (torch.nn.Parameter,), {"__module__": module})
    plain, quantized = torch.nn.Parameter(torch.ones(4, 4)), kind(torch.ones(8, 4))
    with pytest.raises(ValueError, match=rf"group 0: parameter 1 of shape \(8, 4\) is quantized.*{name}.*LoRA"):
        Automagic_CameAMP([plain, quantized])
    optimizer = Automagic_CameAMP([{"params": [plain], "param_names": ["v"]}])
    with pytest.raises(ValueError, match="group 1: parameter 'w'"):
        optimizer.add_param_group({"params": [quantized], "param_names": ["w"]})
    assert len(optimizer.param_groups) == 1
    Automagic_CameAMP([plain, quantized.requires_grad_(False)])  # Frozen, as beside a LoRA.


def test_quanto_itself():
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    with pytest.raises(ValueError, match="optimum's WeightQBytesTensor"):
        Automagic_CameAMP(model.parameters())

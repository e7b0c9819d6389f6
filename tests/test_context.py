"""The context of C-Optim: what reaches it, what it says, and what follows for the learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from reliability.processes import in_processes
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost import operations
from benchmarks.detection import measure
from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    report_loss,
)
from library.cameamp.context import detection
from library.cameamp.context.sampling import Sampler

SHAPES = [(8, 16), (16, 8), (12,)]


def training(optimizer_class=Automagic_CameAMP_COptim, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in SHAPES]
    return params, optimizer_class(params, **{"warmup_steps": 20, **options})


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_losses_reach_the_context_by_every_way():
    params, optimizer = training()
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    set_gradients(params, 0)
    optimizer.report_loss(torch.tensor(1.0, requires_grad=True))
    optimizer.step()
    report_loss(optimizer, 2)
    optimizer.step()
    report_loss(wrapped, torch.tensor([3.0]))
    wrapped.step()
    optimizer.step(lambda: torch.tensor(4.0))
    optimizer.step()
    assert optimizer.c_optim.loss_history == [1.0, 2.0, 3.0, 4.0]


def test_a_loss_of_a_step_without_gradients_is_not_the_next_ones():
    params, optimizer = training()
    for number, loss in enumerate((1.0, 100.0, 2.0)):
        set_gradients(params, number)
        if loss == 100.0:
            optimizer.zero_grad()
        optimizer.report_loss(loss)
        optimizer.step()
    assert optimizer.c_optim.loss_history == [1.0, 2.0]


@pytest.mark.parametrize("level", [0.3, 1.0, 40.0])
def test_rounding_is_no_spike(level):
    losses = torch.full((30,), level)
    losses[::7] = torch.nextafter(losses[0], torch.tensor(torch.inf))
    losses[-1] = losses[0]
    assert detection.p_values([detection.spike(losses)]).item() > 0.05
    losses[-1] = 1.01 * level
    assert detection.p_values([detection.spike(losses)]).item() < 0.001


def test_several_reports_are_averaged():
    params, optimizer = training()
    set_gradients(params, 0)
    for value in (1.0, 2.0, torch.tensor(6.0)):
        optimizer.report_loss(value)
    optimizer.step()
    assert optimizer.c_optim.loss_history == [3.0]


@pytest.mark.parametrize("other", [None, object(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)])
def test_reporting_to_others_is_silent(other):
    report_loss(other, torch.tensor(1.0))
    report_loss(training(Automagic_CameAMP)[1], "anything")


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="the loss is 'low'; allowed: a number or a tensor"):
        training()[1].report_loss("low")


def test_reading_changes_nothing_and_costs_one_read_back():
    def run(read):
        params, optimizer = training(lr=1e-4)
        for number in range(30):
            set_gradients(params, number)
            optimizer.report_loss(float(number % 4))
            optimizer.step()
            if read:
                context = optimizer.c_optim
                for call in (
                    context.detect_edge_case,
                    context.compute_contextual_lr_multiplier,
                    context.compute_gradient_consistency,
                    context.compute_update_alignment,
                    context.compute_loss_stability,
                ):
                    assert len(operations(call).read_backs) <= 1
                assert len(context.loss_history) == len(context.lr_history) == number + 1
                assert len(context.gradient_history) == number
        return params

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False)))


def test_before_the_first_step():
    context = training(lr=1e-4)[1].c_optim
    assert context.compute_contextual_lr_multiplier() == pytest.approx(0.01)
    assert context.compute_gradient_consistency() == 1.0
    assert context.compute_update_alignment() == 0.0
    assert context.compute_loss_stability() == 1.0
    assert context.detect_edge_case() is False
    assert context.loss_history == context.gradient_history == context.lr_history == []


@pytest.mark.parametrize("optimizer_class", [Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit])
def test_no_read_back(optimizer_class):
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(64, 128), (4, 1280), (5,)]]
    optimizer = optimizer_class(params, warmup_steps=6, momentum_scales=(1, 2, 3, 5), fused=False)
    for number in range(12):
        set_gradients(params, number)
        optimizer.report_loss(torch.tensor(1.0))
        read_backs = operations(optimizer.step).read_backs
        assert number == 0 or read_backs == []  # bitsandbytes makes its maps at the first


# What it does with what it sees ----------------------------------------------------------------------------------


def follow(signs, loss=None, **options):
    """A course of the multiplier: the gradient is always the same, but for its sign."""
    params, optimizer = training(lr=1e-6, full_finetune=True, **{"warmup_steps": 0, **options})
    set_gradients(params, 0)
    course = []
    for number, sign in enumerate(signs):
        for p in params:
            p.grad = p.grad.abs() * sign
        if loss is not None:
            optimizer.report_loss(loss(number))
        optimizer.step()
        course.append(optimizer.c_optim.compute_contextual_lr_multiplier())
    return course, optimizer.c_optim


def test_it_climbs_while_steps_agree_and_stops_at_its_bound():
    """No step is longer than the longest step of the highest rate, which is ten times that."""
    course, context = follow([1] * 30, lr_bump=0.0)
    assert course[:20] == sorted(course[:20])
    length = float(context.state_dict()["c_optim_context"]["length"])
    assert course[-1] * length * 1e-6 == pytest.approx(10 * 1e-3)
    assert context.compute_update_alignment() > 0.5


def test_it_falls_when_steps_overshoot():
    course, context = follow([1, -1] * 10)
    assert course[-1] < 0.1
    assert context.compute_gradient_consistency() == pytest.approx(-1.0, abs=1e-2)
    assert context.detect_edge_case()


def test_it_starts_safe_whatever_the_lr():
    for lr in (1e-6, 1e-4, 1e-3):
        params, optimizer = training(lr=lr, warmup_steps=0, full_finetune=True)
        set_gradients(params, 0)
        optimizer.step()
        assert optimizer.get_learning_rates() == pytest.approx([1e-6])


def test_an_edge_case_halves_and_does_not_grow():
    calm, _ = follow([1] * 12, lambda number: 1.0 + 0.1 * math.sin(number))
    course, context = follow([1] * 12, lambda number: 1.0 + 0.1 * math.sin(number) + 50 * (number == 11))
    assert course[:11] == calm[:11]
    assert context.detect_edge_case()
    assert context.edge_case_count == 1
    assert course[11] == pytest.approx(course[10] / 2)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_an_edge_case_at_once(what):
    params, optimizer = training(edge_threshold=1.0)
    set_gradients(params, 0)
    if what == "gradient":
        params[1].grad[0, 0] = math.nan
    optimizer.report_loss(math.inf if what == "loss" else 1.0)
    optimizer.step()
    assert optimizer.c_optim.detect_edge_case()
    set_gradients(params, 1)
    optimizer.report_loss(1.0)
    optimizer.step()
    assert not optimizer.c_optim.detect_edge_case()
    assert all(p.isfinite().all() for p in params)


def test_too_little_to_test_is_no_confidence():
    """And not NaN, which a checkpoint of the first steps would carry."""
    params, optimizer = training()
    for number in range(12):
        set_gradients(params, number)
        optimizer.step()
        saved = optimizer.state_dict()["param_groups"][0]["c_optim_context"]
        assert saved["confidence"].isfinite()
        assert (saved["confidence"] == 0) == (number < 4)


def test_without_any_loss_gradients_alone_decide():
    _, context = follow([1] * 5 + [1, -1] * 6)
    assert context.detect_edge_case()
    assert context.loss_history == []


# Options ---------------------------------------------------------------------------------------------------------


def test_context_window_bounds_the_histories():
    for window in (2, 7):
        _, context = follow([1] * 20, float, context_window=window)
        assert context.loss_history == [float(n) for n in range(20 - window, 20)]
        assert len(context.lr_history) == len(context.gradient_history) == window


def test_edge_threshold_decides():
    def loss(number):
        return 1.0 + 0.1 * math.sin(7 * number) + 0.25 * (number == 24)

    assert follow([1] * 25, loss, edge_threshold=0.6)[1].detect_edge_case()
    assert not follow([1] * 25, loss, edge_threshold=0.999999)[1].detect_edge_case()


def test_adaptation_rate_is_the_pace():
    slow, middle, fast = (math.log(follow([1] * 4, adaptation_rate=rate)[0][-1]) for rate in (0.001, 0.002, 0.003))
    assert middle - slow > 0.05
    assert fast - middle == pytest.approx(middle - slow, rel=0.1)
    assert follow([1] * 9, adaptation_rate=0.0)[0][-1] == 1.0


@pytest.mark.parametrize("shapes", [[(8, 320), (320, 8)] * 40, [(16, 768), (96, 96, 3, 3)], [(5, 7)], [(151, 64)] * 99])
def test_samples_meet_all_rows_and_columns_alike(shapes):
    sampler = Sampler([math.prod(shape) for shape in shapes])
    for rows, *columns in shapes:
        count = math.prod(columns)
        seen = torch.zeros(rows * count)
        seen[:: sampler.every] = 1
        for dim in (0, 1):
            hits = seen.view(rows, count).sum(dim)
            assert hits.max() - hits.min() <= 1


def test_momentum_scales_are_those_kept():
    params, optimizer = training(momentum_scales=(3, 4))
    for number in range(9):
        set_gradients(params, number)
        optimizer.step()
    state = optimizer.state[params[0]]
    assert {name for name in state if name.startswith("momentum")} == {
        "momentum_scale_3", "momentum_scale_4", "momentum_count_3", "momentum_count_4",
    }  # fmt: skip
    assert (state["momentum_count_3"], state["momentum_count_4"]) == (3, 2)


def test_the_context_is_the_whole_optimizers():
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    with pytest.raises(ValueError, match="parameter group 1: option 'context_window' is 7; there is one context"):
        Automagic_CameAMP_COptim([{"params": params[:1]}, {"params": params[1:], "context_window": 7}])
    for lr in (0, 1.0):  # Frozen, and above max_lr, which raises that.
        with pytest.raises(ValueError, match="parameter group 0: option 'context_window' is 7; there is one context"):
            Automagic_CameAMP_COptim([{"params": params, "lr": lr, "context_window": 7}])
    Automagic_CameAMP([{"params": params[:1]}, {"params": params[1:], "context_window": 7}])


@pytest.mark.parametrize(
    "optimizer_class",
    [Automagic_CameAMP, Automagic_CameAMP8bit, Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit],
)
def test_cautious_takes_no_step_against_the_gradient(optimizer_class):
    def run(cautious):
        p = torch.nn.Parameter(0.1 * torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
        optimizer = optimizer_class(
            [p], cautious=cautious, warmup_steps=0, beta1_decay=0.5, momentum_scales=(1, 3), lr=1e-4
        )
        against = 0
        for number in range(6):
            p.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(number))
            before = p.detach().clone()
            optimizer.step()
            against += int(((before - p.detach()) * p.grad < 0).sum())
        return against

    assert run(cautious=True) == 0
    assert run(cautious=False) > 0


# Detection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Gaussian", "log-normal"])
def test_detection(kind):
    """At the default window; thresholds 0.8, 0.9, 0.95, 0.99, and three standard errors of 1,000 streams."""
    seen = measure(kind, 100, 1000)
    for threshold, share in zip((0.8, 0.9, 0.95, 0.99), seen["false alarms per step"]):
        allowed = 1 - threshold + 0.02
        assert share <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / 1000)
    # Six raw deviations of log-normal noise are no rare event at the highest threshold.
    assert min(seen["spike of 6 robust deviations"][: 4 if kind == "Gaussian" else 3]) >= 0.95
    assert min(seen["the same of the logarithms"]) >= 0.95
    assert min(seen["rise by a deviation a window"][:3]) >= 0.8
    assert min(seen["flipping gradients, 10 steps"]) >= 0.99


def test_the_median_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(500, 12, generator=generator)
    windows[torch.rand(500, 12, generator=generator) < torch.rand(500, 1, generator=generator)] = torch.nan
    windows[0] = torch.nan
    middle = (windows.isfinite().sum(dim=-1, keepdim=True) - 1).clamp_min(0) // 2
    got = detection._in_order(windows, middle).squeeze(-1)
    assert torch.equal(got.nan_to_num(9.0), windows.nanmedian(dim=-1).values.nan_to_num(9.0))


def test_detection_takes_no_cumulative_sum_of_floats():
    """Before PyTorch 2.6 a GPU has no deterministic one, and deterministic training would fail at every step."""

    dtypes = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.cumsum:
                dtypes.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Watching():
        detection.confidence(torch.rand(100), torch.rand(100))
    assert dtypes == [torch.bool]


def test_a_steady_or_falling_loss_is_no_edge_case():
    quiet = torch.zeros(3, 100)
    losses = torch.stack([torch.full((100,), 0.3), torch.linspace(1, 0.1, 100), torch.full((100,), torch.nan)])
    assert (detection.confidence(losses, quiet) < 0.6).all()


# Ranks -----------------------------------------------------------------------------------------------------------


def trained_on_a_rank(rank):
    params, optimizer = training(lr=1e-4, context_window=12)
    for number in range(20):
        set_gradients(params, number)
        optimizer.report_loss(1.0 + rank + 0.1 * math.sin(number) + (99.0 if rank == number % 2 == 1 else 0.0))
        optimizer.step()
    context = optimizer.c_optim
    return {
        "weights": [p.detach() for p in params],
        "losses": context.loss_history,
        "length": float(optimizer.state_dict()["param_groups"][0]["c_optim_context"]["length"]),
        "multiplier": context.compute_contextual_lr_multiplier(),
        "edge_cases": context.edge_case_count,
    }


def test_ranks_with_different_losses_stay_the_same():
    first, second = in_processes(2, trained_on_a_rank)
    assert all(torch.equal(a, b) for a, b in zip(first.pop("weights"), second.pop("weights")))
    assert first == second
    assert first["losses"][-1] == pytest.approx(1.5 + 0.1 * math.sin(19) + 49.5)
    # Another process with the same gradients does not make the step longer.
    assert first["length"] == pytest.approx(trained_on_a_rank(0)["length"], rel=0.01)

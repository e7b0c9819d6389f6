"""The context beside kernels of a CPU: the values of PyTorch's operations, and what happens where it fails."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from library.automagic_cameamp import Automagic_CameAMP_COptim
from library.cameamp.context import cpu_detection, detection
from library.cameamp.context.controller import STANDARD_LAW, ContextualOptimizationModule
from library.cameamp.context.cpu import Numbers
from library.cameamp.context.sampling import Sampler

pytest.importorskip("numba", reason="kernels of a CPU need numba")


def values_of(module):
    saved = module.state_dict()
    context = saved["c_optim_context"]
    return {**context, "multiplier": torch.tensor(saved["contextual_lr_multiplier"])}, saved["edge_case_count"]


@pytest.mark.parametrize("window", [2, 12, 100])
@pytest.mark.parametrize("kind", ["calm", "wild", "without losses", "equal losses", "negative losses"])
def test_every_value_is_that_of_the_operations(kind, window):
    """Step by step from the same memory, with everything that a history may hold."""
    generator = torch.Generator().manual_seed(window)
    modules = [ContextualOptimizationModule(window, 0.9, 0.1, STANDARD_LAW) for _ in range(2)]
    for module in modules:
        module.set_bounds(1e-4, 1e-3)
    direction = torch.randn(999, generator=generator)
    edge_cases = 0
    for step in range(130):
        noise = torch.randn(999, generator=generator)
        gradient = noise + 0.3 * direction * (-1 if kind == "wild" and step % 9 > 5 and step % 2 else 1)
        loss = 2.0 + 0.2 * float(torch.randn((), generator=generator)) + (3.0 if step % 40 == 39 else 0.0)
        if kind == "wild":
            gradient = gradient * (0.0 if step % 17 == 3 else 10.0 ** (step % 7))
            loss = (loss, math.inf, math.nan, -loss, loss, loss, loss)[step % 7] if step < 60 else loss + step / 20
        loss = {"without losses": None, "equal losses": 0.3, "negative losses": -loss}.get(kind, loss)
        unusable = torch.tensor(int(kind == "wild" and step % 23 == 5))
        found = []
        for module, kernels in zip(modules, (None, Numbers())):
            found.append(module.update_context(gradient, loss, 1e-4, unusable, kernels))
            module.follow(gradient, 0.01 * gradient + 0.02 * direction, kernels=kernels)
        assert torch.allclose(*found, rtol=1e-5, atol=0), step
        (expected, edge_cases), (got, its_edge_cases) = map(values_of, modules)
        assert edge_cases == its_edge_cases, step
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert value.dtype == got[name].dtype
            if name == "course":  # A number on a midpoint may fall to the other side.
                assert torch.allclose(value.float(), got[name].float(), rtol=0.01, atol=1e-4), step
            elif name == "last_gradient":
                assert torch.equal(value, got[name]), step
            else:
                assert torch.allclose(value, got[name], rtol=2e-5, atol=2e-6, equal_nan=True), (step, name)
        modules[1].load_state_dict(modules[0].state_dict())
    assert edge_cases > 0 or kind != "wild"


def test_confidence_is_that_of_the_operations():
    """On windows with gaps, equal losses and trends of all kinds."""
    generator = torch.Generator().manual_seed(0)
    for number in range(300):
        losses = 1 + 0.3 * torch.randn(40, generator=generator) + torch.linspace(0, number % 3, 40)
        losses = losses.round(decimals=number % 4)
        losses[torch.rand(40, generator=generator) < (number % 5) / 6] = torch.nan
        cosines = torch.randn(40, generator=generator) * 0.2 - 0.1 * (number % 4)
        losses[-1], cosines[-1] = 1.0, torch.nan
        got = cpu_detection.confidence(losses.numpy(), cosines.numpy())
        assert got == pytest.approx(float(detection.confidence(losses, cosines)), rel=2e-5, abs=2e-6)


def test_a_confidence_at_the_threshold_is_an_edge_case_for_both():
    """In float32, which has no 0.9: a bound that is the nearest number to it is reached by that number."""
    found = []
    for kernels in (None, Numbers()):
        module = ContextualOptimizationModule(100, 0.9, 0.1, STANDARD_LAW)
        module.set_bounds(1e-4, 1e-3)
        gradient = torch.ones(64)
        module.update_context(gradient, 1.0, 1e-4, None, kernels)
        saved = module.state_dict()
        saved["c_optim_context"] |= {"confidence": torch.tensor(0.9), "course": gradient.bfloat16()}
        module.load_state_dict(saved)
        module.follow(gradient, 1e-4 * gradient, kernels=kernels)
        found.append(module.compute_contextual_lr_multiplier() / saved["contextual_lr_multiplier"])
    assert found[0] <= 1.0
    assert found == pytest.approx([found[0]] * 2)


SHAPES = [(16, 320), (640, 16), (33, 7), (9,)]


def trained(steps=12, groups=1, **options):
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in SHAPES]
    given = [{"params": params[number::groups]} for number in range(groups)]
    optimizer = Automagic_CameAMP_COptim(given, **{"lr": 1e-4, "warmup_steps": 8, **options})
    for step in range(steps):
        for number, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator) * 0.01
            p.grad = None if step % 5 == number else gradient
        optimizer.report_loss(1.0)
        optimizer.step()
    return params, optimizer


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("library") and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_decide_where_kernels_step(groups, monkeypatch):
    calls = []
    for name in ("update_context", "follow"):
        method = getattr(Numbers, name)
        monkeypatch.setattr(
            Numbers, name, lambda *args, name=name, method=method: (calls.append(name), method(*args))[1]
        )
    _, by_kernels = trained(groups=groups)
    assert calls == ["update_context", "follow"] * 12
    _, by_rules = trained(groups=groups, fused=False)
    assert len(calls) == 24
    for (name, value), (_, other) in zip(*(values_of(o.c_optim)[0].items() for o in (by_kernels, by_rules))):
        assert torch.allclose(value.float(), other.float(), rtol=0.02, atol=1e-3, equal_nan=True), name


@pytest.mark.parametrize("method", ["update_context", "follow"])
@pytest.mark.parametrize("late", [False, True])
def test_kernels_that_fail_are_left_with_nothing_changed(method, late, caplog, monkeypatch):
    """Nor by what they had already done: the course is that of the operations from there on."""
    kernel = getattr(Numbers, method)

    def failing(*args):
        if late:
            kernel(*args)
        raise ValueError("cannot be compiled\nbecause")

    monkeypatch.setattr(Numbers, method, failing)
    found, _ = trained()
    text = "the kernels of the context do not work here, PyTorch's operations go on without them"
    assert warnings_of(caplog) == [f"fused: {text}: ValueError: cannot be compiled"]

    def without(*_):
        raise ValueError

    monkeypatch.setattr(Numbers, "update_context", without)
    expected, _ = trained()
    if method == "update_context":
        assert all(torch.equal(p, q) for p, q in zip(found, expected))
    else:
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(found, expected))


class LargestOperation(TorchDispatchMode):
    """Notes how many elements the largest result of an operation has, but for views and memory that is not filled."""

    ignored = (torch.ops.aten.empty.memory_format, torch.ops.aten.lift_fresh.default)

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and func not in self.ignored:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"fused": False}])
def test_torch_shares_no_operation_among_its_threads(options):
    """Of more than 32,768 elements it would, and its threads then spin for milliseconds, in the way of the kernels."""
    params = [torch.nn.Parameter(torch.zeros(256, 300)) for _ in range(4)]
    optimizer = Automagic_CameAMP_COptim(params, warmup_steps=4, full_finetune=True, **options)
    for step in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        with LargestOperation() as largest:
            optimizer.step()
        if step not in (0, 1, 3):  # Those hold the kernels against the rules.
            assert (largest.elements <= 32_768) == (not options), step


def test_samples_of_kernels_and_rules_are_gathered_into_one():
    """One group may be measured by kernels, which fill the vector, and the next one by rules."""

    class Part:
        def __init__(self, number):
            self.parameter_numbers, self.device = (number,), torch.device("cpu")
            self.first_element, self.rows, self.columns = 0, 1, 4

    sampler = Sampler([4, 4, 4])
    vector = torch.zeros(sampler.size)
    vector[: sampler.starts[1]] = 1.0
    piece = torch.full((1, sampler.starts[3] - sampler.starts[2]), 2.0)
    expected = vector.clone()
    expected[sampler.starts[2] :] = 2.0
    assert torch.equal(sampler.gather([Part(0), Part(2)], [vector, piece]), expected)
    assert sampler.gather([Part(0), Part(1)], [vector, vector]) is vector

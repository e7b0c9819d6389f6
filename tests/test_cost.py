"""What a step costs: operations, read-backs, bytes of state and of temporary memory. Never time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import library.automagic_cameamp as family
from benchmarks.cost import operations, state_bytes, temporary_bytes
from benchmarks.models import load, parameters
from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP8bit

FAMILY = [name for name in family.__all__ if name.startswith("Automagic")]
PHASES = {"early": 1_000_000, "late warm-up": 100, "after": 0}


def prepared(shapes, phase, optimizer_class=Automagic_CameAMP, **options):
    """An optimizer whose next steps lie in a phase, and are taken by the rules unless an option says otherwise."""
    optimizer = optimizer_class(parameters(shapes), warmup_steps=PHASES[phase], **{"fused": False, **options})
    optimizer.step()
    for state in optimizer.state.values():
        state["step"] = PHASES[phase] // 2 + 10 if phase == "late warm-up" else 1
    return optimizer


@pytest.mark.parametrize(("phase", "limit"), [("early", 1200), ("late warm-up", 800), ("after", 600)])
def test_operations_of_an_sdxl_lora(phase, limit):
    optimizer = prepared(load("sdxl_lora16"), phase)
    counted = operations(optimizer.step)
    assert 100 < counted.counts.total() <= limit
    assert counted.read_backs == []


def test_kernels_of_1x1_are_stacked_with_matrices():
    matrices, kernels = [(16, 64), (64, 16)], [(16, 64, 1, 1), (64, 16, 1, 1)]
    alike, mixed = prepared(matrices * 4, "after"), prepared(matrices * 2 + kernels * 2, "after")
    assert operations(mixed.step).counts == operations(alike.step).counts
    for p in mixed.param_groups[0]["params"]:
        assert mixed.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("options", [{}, {"came": False, "cautious": True, "verbose": True}], ids=["default", "others"])
def test_no_read_back(phase, options):
    shapes = [(4, 32), (32, 4), (16, 8, 3, 3), (5,), (), (1, 1)] * 2
    params = parameters(shapes)
    params[3].grad = None
    params = [torch.nn.Parameter(p.bfloat16()) if p.ndim == 4 else p for p in params]
    for p in params:
        if p.ndim == 4:
            p.grad = torch.ones_like(p)
    optimizer = Automagic_CameAMP(params, warmup_steps=PHASES[phase], fused=False, **options)
    for _ in range(3):  # the first step too, which makes the states
        assert operations(optimizer.step).read_backs == []


def test_the_counter_sees_read_backs():
    """Or the tests above would show nothing."""
    x = torch.tensor([1.0, 0.0])
    assert operations(lambda: x.sum().item()).read_backs
    assert operations(lambda: x.nonzero()).read_backs
    assert operations(lambda: x[x > 0]).read_backs
    assert operations(lambda: bool((x > 0).any())).read_backs
    assert operations(lambda: x + 1).counts.total() == 1


@pytest.mark.parametrize(
    ("model", "limit"),
    [("sdxl_lora16", None), ("sd15_full", 100_000_000)],
)
@pytest.mark.parametrize("phase", PHASES)
def test_temporary_memory(model, limit, phase):
    shapes = load(model, limit)
    largest = max(torch.Size(shape).numel() for shape in shapes)
    optimizer = prepared(shapes, phase)
    assert temporary_bytes(optimizer) <= max(256 * 2**20, 6 * 4 * largest)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("model", "limit", "bound"), [("sd15_lora16", None, 8), ("sdxl_full", 12_000_000, 12)])
@pytest.mark.parametrize("phase", PHASES)
def test_temporary_memory_of_kernels(name, model, limit, bound, phase):
    """They compute in the caches; what they hold from one step to the next counts too."""
    pytest.importorskip("numba")
    optimizer = prepared(load(model, limit), phase, getattr(family, name), fused="auto")
    optimizer.step()  # In it kernels are checked, on copies.
    assert temporary_bytes(optimizer) <= bound * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_temporary_memory_with_kept_gradients(dtype):
    """Gradients of another dtype than float32 are gathered into the same memory."""
    params = [torch.nn.Parameter(torch.randn(1024, 1024).to(dtype)) for _ in range(42)]
    for p in params:
        p.grad = torch.randn(1024, 1024).to(dtype)
    optimizer = Automagic_CameAMP8bit(params, fused=False)
    optimizer.step()
    assert temporary_bytes(optimizer) <= 256 * 2**20


@pytest.mark.parametrize("phase", PHASES)
def test_temporary_memory_of_one_large_tensor(phase):
    """Where six copies of the largest tensor are the bound."""
    optimizer = prepared([(4096, 4096), (64,)], phase)
    assert temporary_bytes(optimizer) <= 6 * 4 * 4096 * 4096


@pytest.mark.parametrize(("phase", "expected"), [("early", 21), ("late warm-up", 21), ("after", 16)])
def test_state_bytes(phase, expected):
    optimizer = prepared([(64, 64), (16, 16, 3, 3), (4096,)], phase)
    count = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert state_bytes(optimizer) == expected * count


def test_states_of_the_warm_up_are_freed():
    optimizer = Automagic_CameAMP(parameters([(64, 64)]), warmup_steps=3)
    sizes = []
    for _ in range(4):
        optimizer.step()
        sizes.append(state_bytes(optimizer) // 64**2)
    assert sizes == [21, 21, 16, 16]


def held_bytes(optimizer):
    """Of the memory that the states lie in, whose or nobody's they are."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def test_parameters_left_behind_hold_no_one_elses_memory():
    params = [torch.nn.Parameter(torch.randn(32, 32)) for _ in range(32)]
    optimizer = Automagic_CameAMP(params, warmup_steps=1000)
    for number in range(len(params)):
        for p in params[number:]:
            p.grad = torch.randn(32, 32)
        optimizer.step()
        params[number].grad = None
    assert held_bytes(optimizer) == state_bytes(optimizer)


def test_stacks_given_up_between_steps_are_not_held():
    """Reading divides all parameters, which may be otherwise than the last step divided those that took it."""
    params = [torch.nn.Parameter(torch.randn(512, 512)) for _ in range(40)]
    optimizer = Automagic_CameAMP(params, fused=False)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in params[::2]:
        p.grad = None
    optimizer.step()
    during_step = [weakref.ref(stack) for stack in optimizer._engine._workspace._places]
    optimizer.effective_learning_rates()
    gc.collect()
    held = [stack for group in optimizer._groups for stack in group._layout._known.values()]
    assert during_step
    assert all(stack() is None or stack() in held for stack in during_step)


def test_nor_when_a_group_is_added():
    params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(50)]
    optimizer = Automagic_CameAMP(params, warmup_steps=1000)
    for number in range(2):
        for index, p in enumerate(params):
            p.grad = torch.randn(64, 64) if index < 25 or number == 0 else None
        optimizer.step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(3))]})
    assert held_bytes(optimizer) == state_bytes(optimizer)


def test_an_optimizer_out_of_use_frees_its_states():
    """At once: states that wait for the garbage collector may be gigabytes."""

    def states_of(name):
        p = torch.nn.Parameter(torch.randn(64, 64))
        p.grad = torch.randn(64, 64)
        optimizer = getattr(family, name)([p])
        for _ in range(2):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.effective_learning_rates()
        return [weakref.ref(value) for value in optimizer.state[p].values() if torch.is_tensor(value)]

    names = [name for name in family.__all__ if name.startswith("Automagic")]
    for name in names:  # torch holds on to the first optimizer that a process steps, and so do imports within a step.
        states_of(name)
    gc.disable()
    try:
        assert [[state() for state in states_of(name) if state() is not None] for name in names] == [[]] * len(names)
    finally:
        gc.enable()

"""Steps on CUDA tensors without a card: PyTorch's fake tensors know their device and shape, and have no values.

Whatever would make the program wait for a value of the device has nothing to read, and fails here.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import library.automagic_cameamp as family
from benchmarks.cost import operations
from library.cameamp import family as family_module
from library.cameamp.storage import blockwise, low_rank

NAMES = [name for name in family.__all__ if name.startswith("Automagic")]
HALVES = (torch.bfloat16, torch.float16)  # whose weights are rounded stochastically
WARMUP_STEPS = {"early": 1000, "late warm-up": 6, "after": 0}


@pytest.fixture(autouse=True)
def cuda_without_a_card(monkeypatch):
    """What a build of PyTorch without CUDA cannot do on fake tensors, done otherwise."""
    tables = {signed: blockwise.tables_of(signed, torch.device("cpu")) for signed in (True, False)}
    for signed in tables:
        blockwise._code_of_zero(signed)
    monkeypatch.setattr(blockwise, "tables_of", lambda signed, device: on(device, tables[signed]))
    monkeypatch.setattr(family_module, "require_bitsandbytes", lambda: None)
    # These ask for a driver even then; the operations behind them do not.
    monkeypatch.setattr(torch.Tensor, "__getitem__", view_at)
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda x, key, value: view_at(x, key).copy_(value))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **layout: torch.ops.aten.contiguous(x, **layout))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, source, non_blocking=False: torch.ops.aten.copy_(x, source))
    yield
    low_rank._noise.cache_clear()


def on(device, tables):
    """Tables of the same shapes on a device."""
    return blockwise.Tables(*(torch.empty_like(table, device=device) for table in tables))


def view_at(x, key):
    """x[key], for integers, slices, tensors of indices, and an ellipsis before one last part."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is Ellipsis:
            dim = x.ndim - 1
        elif isinstance(part, int):
            x = x.select(dim, part)
        elif isinstance(part, torch.Tensor):  # PyTorch 2.14's own index_select, of fake tensors.
            x = torch.ops.aten.index(x, [*[None] * dim, part])
            dim += 1
        else:
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
            dim += 1
    return x


def fake_parameters():
    shapes = [(64, 64), (64, 64), (16, 320), (320, 16), (64, 16, 3, 3), (5,), ()]
    params = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
    params += [torch.nn.Parameter(torch.empty(64, 64, device="cuda", dtype=dtype)) for dtype in HALVES]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", WARMUP_STEPS)
def test_no_rule_makes_a_device_wait(name, phase):
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = fake_parameters()
        optimizer = getattr(family, name)(params, warmup_steps=WARMUP_STEPS[phase])
        for _ in range(5):
            family.report_loss(optimizer, torch.empty((), device="cuda"))
            counted = operations(optimizer.step)
            assert counted.read_backs == []
        assert not any(
            group.uncoded for group in optimizer._groups
        )  # What fails is kept in 32 bits otherwise, and tests nothing.
        kept = [value for state in optimizer.state.values() for value in state.values()]
        assert {value.device.type for value in kept if torch.is_tensor(value)} == {"cuda"}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", NAMES)
def test_the_rules_step_single_parameters_of_a_gpu_and_say_so(name, caplog):
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = fake_parameters()
        optimizer = getattr(family, name)(params, warmup_steps=6, fused=True)

        def step_each():
            for index, p in enumerate(params):
                optimizer.step_parameter(p, optimizer.param_groups[0], index)
            optimizer.step()

        for _ in range(4):
            assert operations(step_each).read_backs == []
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["fused: no kernel of 'cuda' takes single parameters, the rules do"]


def test_a_wait_would_be_seen():
    """Or the test above would show nothing."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty((), device="cuda").item()

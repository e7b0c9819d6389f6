"""Kernels on shards: what one process does with its rows, without the other processes."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("this torch has no FSDP2 under its present name", allow_module_level=True)
pytest.importorskip("library.cameamp.step.kernels.cpu.codes", reason="needs numba")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

from torch.distributed.tensor import DTensor, Shard  # noqa: E402

from library.automagic_cameamp import (  # noqa: E402
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)
from library.cameamp.step import engine  # noqa: E402
from library.cameamp.step.kernels.cpu.step import CpuKernels  # noqa: E402

FAMILY = (Automagic_CameAMP, Automagic_CameAMP8bit, Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit)
PROCESSES, RANK = 3, 1  # The second of three: its rows begin within the tensor.
# Rows in one block and in several, short ones, some that are not coded, a kernel, a vector, one of several parts, and
# one that this process has nothing of; and of low rank in rows that are merged, of which other processes have some of
# the first four. Twice the same shape, for a stack of several tensors.
SHAPES = [
    (100, 320),
    (100, 320),
    (50, 16),
    (40, 24),
    (90, 5),
    (60, 7),
    (16, 32, 3, 3),
    (300,),
    (7, 9000),
    (450, 640),
    (1, 600),
    (404, 4),
]


@pytest.fixture(autouse=True, scope="module")
def mesh():
    with mesh_at(RANK) as mesh:
        yield mesh


@contextmanager
def mesh_at(rank):
    """A mesh whose other processes are not there: what they would add to a sum is 0."""
    dist.init_process_group("fake", rank=rank, world_size=PROCESSES, store=fake.FakeStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    finally:
        dist.destroy_process_group()


def shard_of(mesh, tensor):
    rows, rank = -(-len(tensor) // mesh.size()), mesh.get_local_rank()
    part = tensor[rank * rows : (rank + 1) * rows].contiguous()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def shards(mesh, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    whole = [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(shard_of(mesh, p)) for p in whole]


def train(mesh, optimizer, params, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype)
            p.grad = shard_of(mesh, grad)
        optimizer.report_loss(1.0)
        optimizer.step()


def optimizer_of(cls, params, fused, **options):
    return cls(params, lr=1e-4, warmup_steps=8, fused=fused, **options)


def copied(value):
    """A checkpoint's own copy of all tensors; torch has no deep copy of DTensors."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [copied(part) for part in value]
    return value.clone() if torch.is_tensor(value) else value


@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"came": False}], ids=str)
def test_one_step_is_that_of_the_rules(mesh, cls, options, caplog):
    check_steps(mesh, cls, options, caplog)


def check_steps(mesh, cls, options, caplog, shapes=SHAPES, starts=(0, 2, 4, 9), by=nullcontext, neighbours=0):
    """From the same states, in each phase: the weights but for rounding, and codes except where rounding decides.

    Args:
        starts: how many steps were taken before the one that is looked at.
        by: what the kernels' steps are taken in.
        neighbours: how many weights of each tensor in bfloat16 may be rounded the other way.
    """
    dtype = torch.bfloat16 if options else torch.float32
    params = shards(mesh, dtype, shapes)
    by_rules = optimizer_of(cls, params, False, **options)
    done = 0
    for start in starts:
        train(mesh, by_rules, params, done, start)
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        by_kernels = optimizer_of(cls, others, True, **options)
        if start:
            by_kernels.load_state_dict(copied(by_rules.state_dict()))
        before = [p.to_local().detach().clone() for p in params]
        train(mesh, by_rules, params, start, start + 1)
        with by():
            train(mesh, by_kernels, others, start, start + 1)
        done = start + 1
        assert caplog.messages == [text for text in caplog.messages if "fused" not in text]
        for p, other, first in zip(params, others, before):
            change, found = (x.to_local().detach().double() - first.double() for x in (p, other))
            assert change.numel() == 0 or change.any()
            tolerance = 1e-3 if dtype == torch.float32 else 5e-3
            room = neighbours**0.5 * 2**-8 * first.abs().amax() if neighbours and change.numel() else 0
            assert torch.linalg.vector_norm(found - change) <= tolerance * torch.linalg.vector_norm(change) + room
            check_states(by_rules.state[p], by_kernels.state[other])
    if hasattr(by_rules, "c_optim"):
        found, expected = (each.c_optim.gradient_history[-1] for each in (by_kernels, by_rules))
        assert found == pytest.approx(expected, abs=1e-3)


def check_states(expected, found):
    for key, value in expected.items():
        if not torch.is_tensor(value):
            continue
        value, other = value.to_local(), found[key].to_local()
        if value.numel() == 0:
            continue
        if value.dtype in (torch.uint8, torch.int8, torch.bool):
            assert (value != other).float().mean() <= 0.01, key
        else:
            error = torch.linalg.vector_norm(other.double() - value.double())
            assert error <= 1e-3 * torch.linalg.vector_norm(value.double()) + 1e-30, key


def test_kernels_take_the_steps_and_the_rules_none(mesh, monkeypatch):
    monkeypatch.setattr(engine, "Passes", lambda *arguments: None)
    params = shards(mesh)
    optimizer = optimizer_of(Automagic_CameAMP8bit, params, True)
    monkeypatch.setattr(CpuKernels, "difference", lambda *arguments: "")
    with pytest.raises(AttributeError):  # Only to add up, after the first pass.
        train(mesh, optimizer, params, 0, 1)


def test_a_wrong_kernel_is_caught_before_anything_is_asked(mesh, monkeypatch, caplog):
    """On shards as on whole tensors, and without a message."""
    from library.cameamp.step.kernels.cpu import shards as of_shards

    results, put = [], of_shards.StepOfShards._put
    for wrong in (False, True):
        params = shards(mesh)
        optimizer = optimizer_of(Automagic_CameAMP_COptim8bit, params, wrong)

        def twice(self, stage, answer, totals):
            put(self, stage, [part * 2 for part in answer], totals)

        monkeypatch.setattr(of_shards.StepOfShards, "_put", twice)
        with caplog.at_level(logging.WARNING):
            train(mesh, optimizer, params, 0, 2)
        results.append([p.to_local() for p in params])
    assert len([text for text in caplog.messages if "the kernels do not work here" in text]) == 1
    assert all(torch.equal(p, q) for p, q in zip(*results))


@pytest.mark.parametrize("cls", FAMILY[:2], ids=lambda cls: cls.__name__)
def test_threads_change_no_bit(mesh, cls):
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        params = shards(mesh)
        train(mesh, optimizer_of(cls, params, True), params, 0, 6)
        results.append([p.to_local() for p in params])
    torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(*results))


def test_states_that_can_no_longer_be_coded_go_on_in_32_bits(mesh):
    params = shards(mesh)
    optimizer = optimizer_of(Automagic_CameAMP_COptim8bit, params, True)
    train(mesh, optimizer, params, 0, 2)
    (group,) = optimizer._groups
    before = {p: optimizer.get_lr_mask(p).to_local() for p in params}
    coded = [p for p in params if "exp_avg_q" in optimizer.state[p]]
    group.leave_uncoded(coded, optimizer.state, "a test")
    assert all(torch.equal(optimizer.get_lr_mask(p).to_local(), before[p]) for p in params)
    train(mesh, optimizer, params, 2, 4)
    for p in coded:
        assert not any(key.endswith("_q") for key in optimizer.state[p])
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert p.to_local().numel() == 0 or optimizer.state[p]["exp_avg"].to_local().any()


def test_a_checkpoint_of_an_optimizer_that_was_saved_before_is_whole(mesh):
    """torch keeps what is in the live state, so pieces of a context are there after a checkpoint."""
    params = shards(mesh)
    optimizer = optimizer_of(Automagic_CameAMP_COptim, params, True)
    for step in range(2):
        train(mesh, optimizer, params, step, step + 1)
        saved = copied(optimizer.state_dict())
    optimizer_of(Automagic_CameAMP_COptim, shards(mesh), True).load_state_dict(saved)


@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_parameter_beside_a_shard_of_the_same_shape(mesh, fused):
    """Each has its own formats."""
    whole = torch.randn(48, 80)
    params = [torch.nn.Parameter(shard_of(mesh, whole)), torch.nn.Parameter(whole.clone())]
    optimizer = optimizer_of(Automagic_CameAMP_COptim8bit, params, fused)
    params[0].grad, params[1].grad = shard_of(mesh, whole), whole.clone()
    optimizer.step()
    assert len(optimizer.state[params[0]]["exp_avg_q_scale"].to_local()) == 1
    assert optimizer.state[params[1]]["exp_avg_q_scale"].shape == (15,)

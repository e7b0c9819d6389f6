"""The kernels of GPUs on shards, run by Triton's interpreter: what one process does with its rows is what rules do.

All of it takes minutes. Without TRITON_TESTS=all only a part runs: an early step, and one after the warm-up.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", minversion="3.7", reason="Triton's interpreter is needed, of 3.7 or newer")
pytest.importorskip("test_shards", reason="needs FSDP2 and numba")

from reliability import resharded
from reliability.processes import in_processes
from reliability.sharded import alone, steps_of
from test_shards import (
    FAMILY,
    PROCESSES,
    check_states,
    check_steps,
    copied,
    mesh_at,
    optimizer_of,
    shard_of,
    shards,
    train,
)

from benchmarks.compiled import Recorder, launching
from benchmarks.cost import operations
from benchmarks.kernels import recorded
from library.cameamp.stacks import layout
from library.cameamp.step import engine
from library.cameamp.step.kernels.gpu import moments
from library.cameamp.step.kernels.gpu.passes import GpuKernels

# Blocks of several rows that are no powers of two, low rank, rows of several blocks, one that is not coded, a vector,
# twice the same shape, one element, and one that this process has nothing of. The first two have nine rows here, and
# others have ten and nine; and low rank in rows that are merged.
SHAPES = [(29, 80), (27, 80), (30, 80), (30, 80), (90, 5), (300,), (6, 5200), (1,), (1, 600), (404, 4)]
KERNEL_AND_WIDE = [(6, 8, 3, 3), (30, 320), (9, 24), (6, 2100)]
NAMES = ("Automagic_CameAMP", CONTEXTUAL := "Automagic_CameAMP_COptim")
STEPS = 10  # Early until step 6.
ALL = os.environ.get("TRITON_TESTS") == "all"
STARTS = (0, 2, 4, 9) if ALL else (2, 9)
_SLOW = pytest.mark.skipif(not ALL, reason="the interpreter is slow: TRITON_TESTS=all runs this, too")


@pytest.fixture(scope="module")
def mesh():
    """The last of three processes, which has the short shards."""
    with mesh_at(PROCESSES - 1) as mesh:
        yield mesh


@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(KERNEL_AND_WIDE, marks=_SLOW)], ids=["mixed", "wide"])
@pytest.mark.parametrize("options", [{}, {"cautious": True}, pytest.param({"came": False}, marks=_SLOW)], ids=str)
@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_one_step_is_that_of_the_rules(mesh, cls, options, shapes, caplog):
    if not ALL and (cls in FAMILY[1:3] or (cls is FAMILY[0]) != bool(options)):
        pytest.skip("the interpreter is slow: TRITON_TESTS=all runs this, too")
    kernels = GpuKernels()
    neighbours = 1 if options else 0
    check_steps(mesh, cls, options, caplog, shapes, STARTS, lambda: launching(kernels), neighbours)
    assert kernels.launches > 0


@pytest.mark.parametrize("right", [True, False])
def test_kernels_prove_themselves_and_wrong_ones_do_not(mesh, right, caplog):
    """On copies of a shard, as if it were all that there is; where they fail, the rules take the step."""

    class Kernels(GpuKernels):
        def launch(self, kernel, *arguments, **constants):
            if right or kernel is not moments.add_up:
                super().launch(kernel, *arguments, **constants)

    params, expected = (shards(mesh, shapes=[(27, 220), (29, 220), (90, 5)]) for _ in range(2))
    used = Kernels()
    with patch.dict(engine._LOADERS, cpu=lambda: used):
        train(mesh, optimizer_of(FAMILY[3], params, True), params, 0, 1)
    train(mesh, optimizer_of(FAMILY[3], expected, False), expected, 0, 1)
    assert used.launches > 0
    assert len([text for text in caplog.messages if "the rules go on" in text]) == (not right)
    for p, q in zip(params, expected):
        assert torch.allclose(p.to_local(), q.to_local(), rtol=1e-4, atol=1e-8)


def test_launches_do_not_depend_on_the_number_of_tensors(mesh):
    """Of stacks that ask the same, and whose parts are whole sixteens."""
    counts = []
    for shapes in (SHAPES[2:3], [*SHAPES[2:4], (48, 32), (6, 24, 2)]):
        params = shards(mesh, shapes=shapes)
        for p in params:
            p.grad = shard_of(mesh, torch.ones(p.shape))
        counts.append(len(recorded(FAMILY[0](params, lr=1e-6), steps=2)))
    few, many = counts
    assert few == many <= 16


def test_groups_that_are_stacked_otherwise_share_no_layout(mesh, monkeypatch):
    """Tensors of one shape that are one stack in one group, and two in another."""
    monkeypatch.setattr(layout, "_SMALLEST_STACK", 700)
    pair = [(12, 150)] * 2
    params = shards(mesh, shapes=[*pair, (48,), *pair, (36000,)])
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]

    def optimizer_of_groups(own, fused):
        groups = [{"params": own[:3]}, {"params": own[3:]}]
        return FAMILY[3](groups, lr=1e-4, warmup_steps=0, fused=fused, momentum_scales=(1, 2, 3, 4, 5))

    by_rules, by_kernels = optimizer_of_groups(params, False), optimizer_of_groups(others, True)
    train(mesh, by_rules, params, 0, 1)
    by_kernels.load_state_dict(copied(by_rules.state_dict()))
    for p, other in zip(params, others):
        other.data.copy_(p.data)
    train(mesh, by_rules, params, 1, 2)
    with launching(GpuKernels()):
        train(mesh, by_kernels, others, 1, 2)
    for p, other in zip(params, others):
        check_states(by_rules.state[p], by_kernels.state[other])


def test_nothing_is_read_back(mesh):
    """Also where momenta of low rank follow."""
    params = shards(mesh, shapes=SHAPES)
    optimizer, recorder = FAMILY[3](params, lr=1e-6, momentum_scales=(1, 2)), Recorder()
    for step in range(2):
        for p in params:
            p.grad = shard_of(mesh, torch.ones(p.shape))
        optimizer.report_loss(torch.tensor(1.0))
        with launching(recorder):
            counted = operations(optimizer.step)
        assert step == 0 or not counted.read_backs
    assert recorder.launches > 0


def taken_together(rank):
    """The first process takes its steps by kernels of GPUs, the second by rules, the third by those of CPUs."""
    with launching(GpuKernels()) if rank == 0 else nullcontext():
        steps = steps_of(rank, (3,), NAMES, STEPS, False, [1])
        coded = resharded.trained(
            rank, CONTEXTUAL, 2 * STEPS, True, adaptation_rate=1e-3, fused="auto" if rank != 1 else False
        )
    return {"steps": steps, "right factors": coded["right factors"]}


@_SLOW
def test_processes_take_a_step_together_whoever_takes_their_part_of_it():
    first, *others = processes = in_processes(3, taken_together)
    for name in NAMES:
        expected, _ = alone(name, STEPS)
        for process in processes:
            for p, weight in process["steps"][name]["weights"].items():
                assert torch.allclose(weight, expected[p], rtol=2e-6, atol=2e-7), p
    assert any(factor.any() for factor in first["right factors"])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["right factors"], other["right factors"], strict=True))

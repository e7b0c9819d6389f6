"""The kernels of GPUs, run by Triton's interpreter on tensors of the CPU: the numbers are those of the rules.

All of it takes minutes. Without TRITON_TESTS=all only a part runs: every phase, 8 bits, the context, and the launches.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from contextlib import nullcontext
from unittest.mock import patch

import numpy
import pytest
import torch

pytest.importorskip("triton", minversion="3.7", reason="Triton's interpreter is needed, of 3.7 or newer")

import triton
import triton.language as tl
from test_equivalence import CONTEXTUAL, LORA, compare

import library.automagic_cameamp as family
from benchmarks import contenders, gpu
from benchmarks.compiled import Recorder, launching
from benchmarks.cost import operations
from benchmarks.kernels import recorded
from benchmarks.models import load, parameters
from library.cameamp.config import OptimizerConfig
from library.cameamp.context.controller import ContextualOptimizationModule
from library.cameamp.context.detection import confidence
from library.cameamp.context.gpu import ContextKernels
from library.cameamp.context.memory import Memory
from library.cameamp.rounding import Dither
from library.cameamp.states import TABLE
from library.cameamp.step import engine
from library.cameamp.step.kernels import table as fields
from library.cameamp.step.kernels.gpu import codes, writing
from library.cameamp.step.kernels.gpu.course import maps_of_codes_on
from library.cameamp.step.kernels.gpu.launching import Launcher, require_triton
from library.cameamp.step.kernels.gpu.passes import GpuKernels
from library.cameamp.step.kernels.gpu.rules import Rules, numbers_of
from library.cameamp.step.rules import StepScalars
from library.cameamp.storage import blockwise

_SLOW = pytest.mark.skipif(
    os.environ.get("TRITON_TESTS") != "all", reason="the interpreter is slow: TRITON_TESTS=all runs this, too"
)

STEPS, WARMUP = 9, 8  # early until the fourth step, after the warm-up at the ninth
MATRICES = [(8, 40), (48, 8), (8, 40), (48, 8), (9,)]
MIXED = [(32,), (16, 12), (6, 5, 3, 3), (16, 12), (1,), (), (1, 7), (1100,)]  # the last one takes two programs
CODED = [(64, 64), (16, 320), (9,), (40, 112)]  # all but the vector in codes, in blocks of 4096, 1024 and 128
BASE_CLASS, EIGHT_BITS = family.Automagic_CameAMP, family.Automagic_CameAMP8bit
COPTIM, COPTIM_EIGHT_BITS = family.Automagic_CameAMP_COptim, family.Automagic_CameAMP_COptim8bit


@pytest.fixture
def kernels():
    """Inside, all optimizers take their steps by kernels."""
    used = GpuKernels()
    with launching(used):
        yield used
    assert used.launches > 0


def gradients(params, generator):
    for number, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator)
        p.grad = (noise * 10.0 ** (number % 3 - 2) + 0.01).to(p.dtype)


def trained(
    kernels, optimizer_class=BASE_CLASS, shapes=MATRICES, steps=STEPS, dtype=torch.float32, change=None, **options
):
    """The optimizer and its parameters after some steps, by kernels or by the rules."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]
    fused = kernels is not None
    optimizer = optimizer_class(params, **{"lr": 1e-3, "warmup_steps": WARMUP, "fused": fused, **options})
    for step in range(steps):
        gradients(params, generator)
        if change:
            change(step, params)
        if kernels is None:
            optimizer.step()
        else:
            with launching(kernels):
                optimizer.step()
    return optimizer, params


def assert_same(one, other, codes_apart=0):
    """Weights and states agree within rounding; so many codes may be neighbours."""
    (ours, params), (rules, expected) = one, other
    apart = 0
    for p, q in zip(params, expected):
        found, value = p.detach().float(), q.detach().float()
        if p.dtype == torch.float32 and not codes_apart:
            assert torch.allclose(found, value, rtol=1e-5, atol=1e-7)
        else:
            assert torch.allclose(found, value, rtol=2e-2, atol=2e-3)
            assert (found != value).float().mean() < (1 if p.dtype == torch.float32 else 0.01)
        assert ours.state[p].keys() == rules.state[q].keys()
        for key, value in rules.state[q].items():
            found = ours.state[p][key]
            if not torch.is_tensor(value):
                assert found == value
            elif value.dtype in (torch.uint8, torch.int8, torch.bool):
                apart += int((found != value).sum())
                assert key.endswith("_q") or torch.equal(found, value)
            else:
                scale = float(value.abs().max())
                assert torch.allclose(found, value, rtol=2e-5, atol=2e-6 * scale), key
    assert apart <= codes_apart


# Against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [LORA[:4], pytest.param(MIXED, marks=_SLOW)], ids=["lora", "mixed"])
def test_reference_in_all_phases(shapes, kernels):
    compare(shapes, steps=12, lora=shapes is not MIXED, warmup_steps=WARMUP)


@_SLOW
def test_reference_with_groups_schedule_and_skipped_steps(kernels):
    own = ({"lr": 1e-4}, {"lr": 1e-5, "weight_decay": 0.0, "betas": (0.9, 0.95, 0.99)})
    compare(
        MIXED[:4], split=2, group_options=own, steps=12, warmup_steps=WARMUP, schedule=lambda step: 1 - step / 20,
        skip=lambda step, index: (step + index) % 5 == 0,
    )  # fmt: skip


def test_reference_of_the_context(kernels):
    compare(LORA[:4], steps=12, lora=True, classes=CONTEXTUAL, warmup_steps=WARMUP, momentum_scales=(1, 3))


# Against the rules ----------------------------------------------------------------------------------------------

OPTIONS = {
    "cautious": {"cautious": True},
    "without CAME": {"came": False, "cautious": True},
    "bias correction": {"bias_correction": True, "full_finetune": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "no warm-up": {"warmup_steps": 0, "steps": 2},
}


@_SLOW
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    assert_same(trained(GpuKernels(), **options), trained(None, **options))


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=_SLOW), {"dtype": torch.bfloat16, "cautious": True}], ids=["plain", "cautious"]
)
def test_8_bits(options):
    """A number between two codes may get the one or the other, where rounding differs; nothing else differs."""
    options = {"optimizer_class": EIGHT_BITS, "shapes": CODED, "steps": 3, **options}
    assert_same(trained(GpuKernels(), **options), trained(None, **options), codes_apart=2)
    options |= {"warmup_steps": 2}
    assert_same(trained(GpuKernels(), **options), trained(None, **options), codes_apart=2)


@_SLOW
@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 3, 4), ()], ids=["four bits", "low rank too", "none"])
def test_momenta(scales):
    options = {"optimizer_class": COPTIM, "shapes": CODED, "momentum_scales": scales, "steps": 4, "warmup_steps": 6}
    assert_same(trained(GpuKernels(), **options), trained(None, **options), codes_apart=2)


@_SLOW
def test_momenta_in_8_bits():
    options = {"optimizer_class": COPTIM_EIGHT_BITS, "shapes": CODED, "momentum_scales": (2, 3), "steps": 3}
    assert_same(trained(GpuKernels(), **options), trained(None, **options), codes_apart=2)


def test_unusable_gradients_are_counted_and_never_seen():
    def spoil(step, params):
        params[0].grad[:2, :3] = torch.tensor([torch.nan, -torch.inf, 2e18])

    ours, rules = trained(GpuKernels(), steps=2, change=spoil), trained(None, steps=2, change=spoil)
    assert_same(ours, rules)
    assert ours[0].nonfinite_elements() == rules[0].nonfinite_elements() == 12


@_SLOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_not_contiguous(dtype):
    def transpose(step, params):
        if step == 0:
            params[0].data = params[0].data.t().contiguous().t()
        params[1].grad = params[1].grad.t().contiguous().t()

    assert_same(
        trained(GpuKernels(), steps=2, change=transpose, dtype=dtype),
        trained(None, steps=2, change=transpose, dtype=dtype),
    )


@_SLOW
def test_from_rules_to_kernels_and_back_at_any_step():
    used = GpuKernels()
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in CODED]
    optimizer = EIGHT_BITS(params, lr=1e-3, warmup_steps=4, fused=True)
    for step in range(5):
        gradients(params, generator)
        by_rules = patch.object(optimizer._engine, "_kernels_of", return_value=None)
        with launching(used), nullcontext() if step % 2 else by_rules:
            optimizer.step()
    expected = trained(None, EIGHT_BITS, CODED, steps=5, warmup_steps=4)
    assert used.launches > 0
    assert_same((optimizer, params), expected, codes_apart=2)


@_SLOW
@pytest.mark.parametrize("optimizer_class", [BASE_CLASS, COPTIM_EIGHT_BITS])
def test_kernels_prove_themselves_and_wrong_ones_do_not(optimizer_class, caplog):
    """At the first step, on copies of real tensors; where they fail, the rules take the step."""
    options = {"optimizer_class": optimizer_class, "shapes": CODED, "steps": 2, "momentum_scales": (1, 2)}
    used = GpuKernels()
    with patch.dict(engine._LOADERS, cpu=lambda: used):
        assert_same(trained(None, fused=True, **options), trained(None, **options), codes_apart=2)
    assert used.launches > 0
    assert not [r for r in caplog.records if r.name.startswith("library") and r.levelno >= logging.WARNING]

    class Wrong(GpuKernels):
        def launch(self, kernel, *arguments, **constants):
            if kernel is not writing.write_step:
                super().launch(kernel, *arguments, **constants)

    with patch.dict(engine._LOADERS, cpu=Wrong):
        assert_same(trained(None, fused=True, **options), trained(None, **options))
    (line,) = [r.message for r in caplog.records if r.name.startswith("library") and r.levelno >= logging.WARNING]
    assert "the rules go on" in line


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(ImportError, match=r"Triton 3\.3\.1 is too old"):
        require_triton()


# Codes ----------------------------------------------------------------------------------------------------------


@triton.jit
def code_and_decode(table, numbers, maps, firsts, x, out, state: tl.constexpr, code: tl.constexpr, rules: tl.constexpr):
    """One span of a state, written down and read again."""
    offsets = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    mask = offsets < tl.load(table)
    values = tl.load(x + offsets, mask, other=0.0)
    codes.store_state(table, state, code, numbers, maps, firsts, offsets, mask, values, 4096, rules)
    tl.store(out + offsets, codes.load_state(table, state, code, maps, offsets, mask, rules), mask)


@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_res", "lr_mask"])
def test_codes_are_the_same_bits_as_those_of_the_rules(name, block):
    """Also of numbers beside the midpoints between codes, of zeros, and of a block of zeros."""
    config = OptimizerConfig(min_lr=1e-6, max_lr=2e-3)
    row = next(state for state in TABLE if state.name == name)
    shape = torch.Size((3, 4096 if block == 4096 else block * 7))
    stored = row.code(config, shape, block).new(1, shape, torch.device("cpu"))
    kernel = {"exp_avg": fields.SIGNED, "exp_avg_res": fields.ROOT, "lr_mask": fields.EVEN}[name]
    x = torch.randn(shape.numel()) * torch.rand(shape.numel()) ** 4
    midpoints = blockwise.tables_of(name == "exp_avg", torch.device("cpu")).midpoints[:-1]
    beside = torch.cat([midpoints, midpoints.nextafter(torch.tensor(9.0)), midpoints.nextafter(torch.tensor(-9.0))])
    x[: min(block, 765)] = beside[: min(block, 765)]
    x[0], x[1], x[-block:] = 1.0, 0.0, 0.0
    if name != "exp_avg":
        x = x.square() if name == "exp_avg_res" else x.abs().clamp(0, 1) * 2e-3
    table = numpy.zeros(fields.FIELDS, dtype=numpy.int64)
    table[[fields.NUMEL, fields.POSITION, fields.BLOCK]] = shape.numel(), 5, block
    found = [torch.zeros_like(tensor) for tensor in stored.tensors]
    place = fields.STATES + 3 * fields.STATE_NUMBERS[name]
    table[place : place + 3] = kernel, found[0].data_ptr(), found[1].data_ptr()
    if name == "lr_mask":
        found[1].copy_(torch.tensor([[1e-6, 2e-3]]))
    numbers = torch.from_numpy(numbers_of(7, config, StepScalars.at(7, config, 1.0)))
    maps, firsts = maps_of_codes_on(torch.device("cpu"))
    decoded = torch.empty_like(x)
    rules = Rules(gradients=0, weights=0, aligned=False, coded=True)
    number = fields.STATE_NUMBERS[name]
    grid = (-(-shape.numel() // 4096),)
    code_and_decode[grid](torch.from_numpy(table), numbers, maps, firsts, x, decoded, number, kernel, rules)
    stored.write(x.clone().view(1, *shape), Dither(torch.tensor([5], dtype=torch.int32), 7))
    for ours, expected in zip(found, stored.tensors):
        assert torch.equal(ours, expected)
    # What the mask's codes stand for is rounded otherwise by torch.lerp on some devices.
    assert torch.allclose(decoded, stored.read().flatten(), rtol=2e-7 if name == "lr_mask" else 0.0, atol=0.0)


# Launches -------------------------------------------------------------------------------------------------------


def launches(optimizer_class, steps, limit=1_000_000, loss=None, **options):
    """Everything that a GPU is asked to do in each of some steps on a LoRA of SDXL: kernels, copies, fills."""
    params = parameters(load("sdxl_lora16", limit))
    optimizer = optimizer_class(params, lr=1e-6, **options)
    counts = []
    recorder = Recorder()
    for _ in range(steps):
        recorder.launches = 0
        with launching(recorder):
            if loss is not None:
                optimizer.report_loss(torch.tensor(loss))
            counted = operations(optimizer.step)
        assert not counted.read_backs
        uploads = 2  # the table, and the numbers of the step
        small = sum(count for name, count in counted.counts.items() if name not in ("empty", "lift_fresh"))
        counts.append(recorder.launches + uploads + small)
    return counts


@pytest.mark.parametrize("warmup", [1000, 3, 0], ids=["early", "late warm-up", "after"])
@pytest.mark.parametrize("optimizer_class", [BASE_CLASS, pytest.param(EIGHT_BITS, marks=_SLOW)])
def test_launches_of_the_base(optimizer_class, warmup):
    most = 16 if optimizer_class is BASE_CLASS else 32
    counts = launches(optimizer_class, steps=3, warmup_steps=warmup)
    assert max(counts[1:]) <= most, counts


def test_launches_do_not_depend_on_the_number_of_tensors():
    few, many = (launches(BASE_CLASS, 2, limit=limit)[-1] for limit in (1_000_000, 2_000_000))
    assert few == many


def test_launches_are_recorded_of_an_optimizer_that_other_kernels_have_stepped():
    build = contenders.in_phases("Automagic_CameAMP")["Automagic_CameAMP, late warm-up"]
    assert "write_step" in [launch.name for launch, _ in recorded(build(parameters([(8, 40)])))]


@pytest.mark.parametrize("warmup", [1000, 2, 0], ids=["early", "late warm-up", "after"])
@pytest.mark.parametrize("optimizer_class", [COPTIM, pytest.param(COPTIM_EIGHT_BITS, marks=_SLOW)])
def test_launches_of_a_context(optimizer_class, warmup):
    """Also when momenta of all periods are due, at the sixth step."""
    counts = launches(optimizer_class, steps=6, warmup_steps=warmup * 4, momentum_scales=(1, 2, 3, 6), loss=1.0)
    assert counts[-1] > counts[-2]
    assert max(counts[1:]) <= 32, counts


# The context ----------------------------------------------------------------------------------------------------


def course(kernels, steps=60, window=24):
    """The module after some steps with losses that rise, jump and end, and gradients that turn; and its multipliers."""
    generator = torch.Generator().manual_seed(1)
    module = ContextualOptimizationModule(window, edge_threshold=0.95, adaptation_rate=0.1)
    module.set_bounds(1e-3, 1e-2)
    used, direction = [], torch.randn(5000, generator=generator)
    for step in range(steps):
        noise = torch.randn(5000, generator=generator)
        gradient = direction * (-1) ** (step // 8 * step) + 0.5 * noise
        loss = 1.0 + 0.1 * float(noise[0]) + (9.0 if step == 15 else 0.0) + max(0, step - 30) * 0.05
        reported = None if step in (3, 4) else torch.tensor(float("nan") if step == 50 else loss)
        lost = torch.tensor(int(step == 20))
        used.append(float(module.update_context(gradient, reported, 1e-3, lost, kernels)))
        module.follow(gradient, gradient * 1e-4, kernels=kernels)
    return module, used


@_SLOW
def test_the_context_decides_the_same():
    (ours, used), (expected, wanted) = course(ContextKernels(Launcher())), course(None)
    assert ours.edge_case_count == expected.edge_case_count > 3
    assert used == pytest.approx(wanted, rel=1e-4)
    for name in ("loss_history", "gradient_history", "lr_history"):
        assert getattr(ours, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-5, nan_ok=True)
    assert ours.compute_update_alignment() == pytest.approx(expected.compute_update_alignment(), abs=1e-5)
    memories = ours.state_dict()["c_optim_context"], expected.state_dict()["c_optim_context"]
    assert memories[0].keys() == memories[1].keys()
    for name, value in memories[1].items():
        assert memories[0][name].dtype == value.dtype
        assert torch.allclose(memories[0][name].float(), value.float(), rtol=1e-4, atol=1e-5, equal_nan=True), name


@_SLOW
@pytest.mark.parametrize("window", [2, 11, 100])
def test_confidence_is_that_of_the_tests(window):
    kernels = ContextKernels(Launcher())
    generator = torch.Generator().manual_seed(window)
    memories = Memory(window), Memory(window)
    for memory in memories:
        memory.values["multiplier"].fill_(1.0)
    for _ in range(15):
        losses = torch.rand(window, generator=generator) + torch.linspace(0, 0.3, window)
        losses[torch.rand(window, generator=generator) < 0.2] = torch.nan
        cosines = torch.rand(window, generator=generator) - 0.7
        memory = memories[0]
        memory.values["loss_history"], memory.values["gradient_history"] = losses, cosines
        gradient = torch.randn(50, generator=generator)
        kernels.update_context(memory, gradient, torch.tensor(0.9), 1.0, None, 1.0, 0.95)
        expected = confidence(memory.values["loss_history"], memory.values["gradient_history"])
        assert float(memory.values["confidence"]) == pytest.approx(float(expected), abs=2e-5)


# The benchmark --------------------------------------------------------------------------------------------------


@_SLOW
def test_the_benchmark_measures_everything_it_promises(monkeypatch, capsys):
    for name, value in {"_SHAPES": [(8, 12), (7,)], "_STEPS": 3, "_UNMEASURED": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    family = (BASE_CLASS.__name__, COPTIM_EIGHT_BITS.__name__)
    monkeypatch.setattr(gpu.contenders, "FAMILY", family)
    results = gpu.measure(torch.device("cpu"), {"small": [(4, 16), (16, 4)]}, rounds=2)
    json.dumps(results, allow_nan=False)
    assert [found["optimizer"] for found in results["equality"]] == list(family)
    assert all(found["weights"] < 1e-3 and found["codes"] == 0 for found in results["equality"])
    ours = [timing for timing in results["steps"] if timing["by"] == "kernels"]
    assert len(ours) == 2 * len(family)
    assert all(timing["milliseconds"] > 0 and timing["launches"] >= 6 for timing in ours)
    assert "torch AdamW fused" in {timing["optimizer"] for timing in results["steps"]}
    assert "small: 2 tensors" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu():
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.run(argparse.Namespace())

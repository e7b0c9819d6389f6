"""Native kernels on a CPU: exact codes and rounding, the same step as the rules, and what happens where they fail."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)
from library.cameamp.rounding import Dither, stochastic_round
from library.cameamp.step import engine
from library.cameamp.storage import blockwise
from library.cameamp.storage.blockwise import Blockwise
from library.cameamp.storage.linear import Linear

numpy = pytest.importorskip("numpy")
codes = pytest.importorskip("library.cameamp.step.kernels.cpu.codes", reason="needs numba")
from library.cameamp.step.kernels.cpu import momenta  # noqa: E402
from library.cameamp.step.kernels.cpu import step as cpu  # noqa: E402
from library.cameamp.step.kernels.cpu.jit import entry  # noqa: E402
from library.cameamp.step.kernels.cpu.settings import _maps  # noqa: E402

FAMILY = (Automagic_CameAMP, Automagic_CameAMP8bit, Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit)
SHAPES = [(16, 320), (640, 16), (64, 64), (9,), (16, 32, 3, 3), (96, 16, 1, 1), (4096,), (33, 7)]


# Called from Python; the kernels themselves are for other kernels.
@entry
def encode(values, state, block, maps, stream):
    codes.store_state(values, state, block, 0, maps, stream)


@entry
def decode(state, block, count, maps, room):
    return codes.load_state(state, block, 0, count, maps, room)


@entry
def round_weights(weights, address, kind, start, stream):
    codes.store_weights(weights, address, kind, start, stream)


@entry
def load_weights(address, kind, count, room):
    return codes.load_floats(address, kind, 0, count, room)


@entry
def stream_of(position, step):
    return codes.noise_stream(position, step)


@entry
def update_levels(codes, sg, factor, high, kept, share, unit, offset, out):
    momenta._update_levels(codes, sg, factor, high, kept, share, unit, offset, out)


@entry
def sum_levels(codes, raw, high, scale, sums):
    momenta._sum_levels(codes, raw, high, scale, sums)


def state_of(stored, kind):
    return numpy.array([kind, *(tensor.data_ptr() for tensor in stored.tensors)], dtype=numpy.int64)


def near_midpoints(signed):
    """Every float32 within some steps of each midpoint between two codes, and of 0 and 1, in blocks that reach 1."""
    midpoints = blockwise.tables_of(signed, torch.device("cpu")).midpoints[:-1]
    places = torch.cat([midpoints, torch.tensor([0.0, 1e-12, 1.0])]).view(torch.int32)
    values = (places.unsqueeze(1) + torch.arange(-60, 61, dtype=torch.int32)).view(torch.float32).flatten()
    values = values[values.isfinite() & (values.abs() <= 1)]
    values = values if signed else values[values >= 0]
    padded = torch.ones(-(-len(values) // 63) * 64).view(-1, 64)
    padded[:, :63].view(-1, 63)[:] = torch.nn.functional.pad(values, (0, -len(values) % 63), value=0.5).view(-1, 63)
    return padded.flatten()


@pytest.mark.parametrize("high", [False, True], ids=["low", "high"])
@pytest.mark.parametrize("count", [225, 64, 15])  # whole sixteens and a rest, no rest, and nothing else
def test_four_bit_levels_of_a_byte_change_one_at_a_time(count, high):
    levels = numpy.arange(-7, 8, dtype=numpy.float32)
    low, upper = (pair.ravel()[:count] for pair in numpy.meshgrid(levels, levels))
    before = (low + 16 * upper).astype(numpy.int8)
    sg = numpy.random.default_rng(count).normal(0, 2, count).astype(numpy.float32)
    sg[:2] = numpy.nan, 1e30
    own, other = (upper, low) if high else (low, upper)
    sum_levels(before[2:], sg[2:], numpy.bool_(high), 1.0, sums := numpy.zeros(2))
    assert sums == pytest.approx([own[2:] @ sg[2:].astype(float), own[2:] @ own[2:]], rel=1e-6)

    codes, out, half, one = before.copy(), numpy.ones(count, dtype=numpy.float32), *numpy.float32([0.5, 1.0])
    update_levels(codes, sg, half, numpy.bool_(high), one, half, one, numpy.float32(7.5), out)
    values = 0.5 * sg + own
    assert numpy.allclose(out[1:], 1 + 0.5 * values[1:], rtol=1e-6)
    new = numpy.clip(numpy.floor(numpy.nan_to_num(values, nan=-numpy.inf) + 0.5), -7, 7)
    assert numpy.array_equal(codes, (new * 16 + other if high else new + 16 * other).astype(numpy.int8))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "root"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-12], ids=str)
def test_codes_are_the_nearest_ones(signed, scale):
    """The same codes and numbers as the rules' storage, for all floats near every midpoint."""
    values = near_midpoints(signed) * scale
    values = values if signed else values.square()
    form = Blockwise(signed, not signed, 64)
    shape = torch.Size((len(values),))
    expected, found = (form.new(1, shape, torch.device("cpu")) for _ in range(2))
    dither = Dither(torch.zeros(1, dtype=torch.int32), 1)
    expected.write(values.view(1, -1, 1).clone(), dither)
    state = state_of(found, codes.ROOT if not signed else codes.ROOT - 1)
    encode(values.clone().numpy(), state, 64, _maps().ctypes.data, numpy.uint32(0))
    for a, b in zip(expected.tensors, found.tensors):
        assert torch.equal(a, b)
    decoded = decode(state, 64, len(values), _maps().ctypes.data, numpy.empty(len(values), dtype=numpy.float32))
    assert torch.equal(torch.from_numpy(decoded), expected.read().flatten())


def test_masks_are_dithered_as_by_the_rules():
    values = torch.rand(4096) * 1.2e-3
    expected, found = (Linear(1e-7, 1e-3).new(1, torch.Size((4096,)), torch.device("cpu")) for _ in range(2))
    expected.write(values.view(1, -1, 1).clone(), Dither(torch.tensor([5], dtype=torch.int32), 37))
    found.tensors[1].copy_(expected.tensors[1])
    encode(values.numpy(), state_of(found, codes.EVEN), 64, 0, stream_of(5, 37))
    assert torch.equal(found.tensors[0], expected.tensors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_as_by_the_rules(dtype):
    """The same bits, of every size, subnormal numbers too; and they are read as they were written."""
    values = torch.randn(3, 5000) * 10.0 ** torch.arange(-9, 6).repeat_interleave(1000).view(3, 5000)
    dither = Dither(torch.tensor([7, 8, 300], dtype=torch.int32), 41)
    expected = stochastic_round(values.view(3, 100, 50), dtype, dither).view(3, 5000)
    kind = cpu.fields.DTYPES[dtype]
    for number, row in enumerate(values):
        found = torch.empty(5000, dtype=dtype)
        stream = stream_of(int(dither.positions[number]), 41)
        round_weights(row.numpy(), found.data_ptr(), kind, 0, stream)
        assert torch.equal(found.view(torch.int16), expected[number].view(torch.int16))
        read = load_weights(found.data_ptr(), kind, 5000, numpy.empty(5000, dtype=numpy.float32))
        assert torch.equal(torch.from_numpy(read), found.float())


def test_every_16_bit_number_is_read():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = patterns.view(dtype)
        room = numpy.empty(len(numbers), dtype=numpy.float32)
        read = torch.from_numpy(load_weights(numbers.data_ptr(), cpu.fields.DTYPES[dtype], len(numbers), room))
        assert torch.equal(read.nan_to_num(7.0), numbers.float().nan_to_num(7.0))


def problem(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]
    return params, generator


def train(optimizer, params, generator, steps):
    for _ in range(steps):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype)
        optimizer.report_loss(1.0)
        optimizer.step()


def trained(cls, steps, dtype=torch.float32, shapes=SHAPES, **options):
    params, generator = problem(dtype, shapes)
    optimizer = cls(params, **{"lr": 1e-4, "warmup_steps": 8, **options})
    train(optimizer, params, generator, steps)
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 9], ids=lambda start: f"step {start + 1}")
def test_one_step_is_that_of_the_rules(cls, dtype, start):
    """From the same states, in each phase: the weights but for rounding, and codes except where rounding decides."""
    params, by_rules = trained(cls, start, dtype, fused=False)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    by_kernels = cls(others, lr=1e-4, warmup_steps=8, fused=True)
    by_kernels.load_state_dict(copy.deepcopy(by_rules.state_dict()))
    before = [p.detach().clone() for p in params]
    for own, optimizer in ((params, by_rules), (others, by_kernels)):
        train(optimizer, own, torch.Generator().manual_seed(2), 1)
    for p, other, first in zip(params, others, before):
        change, found = (x.detach().double() - first.double() for x in (p, other))
        tolerance = 1e-3 if dtype == torch.float32 else 5e-3  # A weight of 16 bits may fall to the other side.
        assert torch.linalg.vector_norm(found - change) <= tolerance * torch.linalg.vector_norm(change)
        for key, value in by_rules.state[p].items():
            if torch.is_tensor(value) and value.dtype in (torch.uint8, torch.int8):
                assert (value != by_kernels.state[other][key]).float().mean() <= 0.005, key
            elif torch.is_tensor(value):
                found = by_kernels.state[other][key].double()
                error = torch.linalg.vector_norm(found - value.double())
                assert error <= 1e-4 * torch.linalg.vector_norm(value.double()), key


@pytest.mark.parametrize("cls", FAMILY[:2], ids=lambda cls: cls.__name__)
def test_threads_change_no_bit(cls):
    """A run that goes on on another number of threads is the same run; contexts aside, whose sums are torch's."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params, _ = trained(cls, 10, shapes=[*SHAPES, (640, 640)])
        results.append(params)
    for others in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], others))


@pytest.mark.parametrize("outlier", [False, True], ids=["none", "outlier"])
@pytest.mark.parametrize("start", [0, 3, 9], ids=lambda start: f"step {start + 1}")
@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_large_groups_are_read_once_less(cls, start, outlier, monkeypatch):
    """What AGR hardly changes is summed with the gradients; where one element is most of its sum it is summed anew."""
    monkeypatch.setattr(cpu, "_MANY", 1)
    monkeypatch.setattr(cpu, "_ROUNDING", 1e-4)  # Gradients of 800 thousand elements are to pass for many.
    taken = []
    sum_scaled = cpu.sum_scaled

    def noted(stage, rows, *rest):
        taken.extend((stage, numel) for numel in rows["numel"].tolist() if numel > cpu._LARGEST_WHOLE)  # no copies
        return sum_scaled(stage, rows, *rest)

    monkeypatch.setattr(cpu, "sum_scaled", noted)
    shapes = [(640, 640), (16, 320), (1024, 320), (640, 640)]
    params, by_rules = trained(cls, start, shapes=shapes, fused=False)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    by_kernels = cls(others, lr=1e-4, warmup_steps=8, fused=True)
    by_kernels.load_state_dict(copy.deepcopy(by_rules.state_dict()))
    before = [p.detach().clone() for p in params]
    for own, optimizer in ((params, by_rules), (others, by_kernels)):
        generator = torch.Generator().manual_seed(2)
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator) * 0.01
        if outlier:
            own[0].grad[3, 5] = 3e5
        optimizer.report_loss(1.0)
        optimizer.step()
    large = sorted([640 * 640, 1024 * 320, 640 * 640])
    assert sorted(numel for stage, numel in taken if stage == cpu.passes.MEASURED) == large
    assert sorted(numel for stage, numel in taken if stage == cpu.passes.SCALED) == ([640 * 640] if outlier else [])
    for p, other, first in zip(params, others, before):
        change, found = (x.detach().double() - first.double() for x in (p, other))
        assert torch.linalg.vector_norm(found - change) <= 1e-3 * torch.linalg.vector_norm(change)


def test_tensors_that_are_not_contiguous():
    shapes = [(16, 320), (32, 16, 3, 3)]

    def changed(fused):
        params, generator = problem(shapes=shapes)
        params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
        optimizer = Automagic_CameAMP(params, lr=1e-4, fused=fused)
        for _ in range(3):
            params[0].grad = (torch.randn(320, 16, generator=generator) * 0.01).T
            params[1].grad = torch.randn(shapes[1], generator=generator)
            params[1].grad = params[1].grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
        return params

    for p, q in zip(changed(True), changed(False)):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


def test_numbers_in_float64():
    (p,), _ = trained(Automagic_CameAMP, 5, torch.float64, [(16, 320)], fused=True)
    (q,), _ = trained(Automagic_CameAMP, 5, torch.float64, [(16, 320)], fused=False)
    assert p.dtype == torch.float64
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


# When they fail -------------------------------------------------------------------------------------------------


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("library") and r.levelno >= logging.WARNING]


def test_a_wrong_kernel_is_caught_and_the_run_goes_on_right(caplog, monkeypatch):
    expected, _ = trained(Automagic_CameAMP, 12, fused=False)
    update = cpu.CpuPasses.update

    def wrong(self, measured, multiplier):
        result = update(self, measured, multiplier)
        measured.stacks[0].params[0].data.mul_(1.01)
        return result

    monkeypatch.setattr(cpu.CpuPasses, "update", wrong)
    found, _ = trained(Automagic_CameAMP, 12)
    assert all(torch.equal(p, q) for p, q in zip(found, expected))
    (warning,) = warnings_of(caplog)
    assert "the kernels do not work here" in warning
    assert "the weights differ by" in warning


def test_a_kernel_that_is_wrong_only_later_is_caught_there(caplog, monkeypatch):
    update = cpu.CpuPasses.update

    def wrong(self, measured, multiplier):
        result = update(self, measured, multiplier)
        if measured.stacks[0].traits.step == 8:
            measured.stacks[0].params[0].data.mul_(1.01)
        return result

    monkeypatch.setattr(cpu.CpuPasses, "update", wrong)
    trained(Automagic_CameAMP, 7)
    assert not warnings_of(caplog)
    trained(Automagic_CameAMP, 9)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("method", ["measure", "prepare"])
def test_a_kernel_that_raises_is_left_before_anything_changes(method, caplog, monkeypatch):
    expected, _ = trained(Automagic_CameAMP_COptim, 5, fused=False)

    def fail(*_):
        raise ValueError("cannot be compiled\nbecause")

    monkeypatch.setattr(cpu.CpuPasses, method, fail)
    found, _ = trained(Automagic_CameAMP_COptim, 5)
    assert all(torch.equal(p, q) for p, q in zip(found, expected))
    assert warnings_of(caplog) == [
        "fused: the kernels do not work here, the rules go on without them: ValueError: cannot be compiled"
    ]


@pytest.mark.parametrize(("fused", "level"), [("auto", logging.INFO), (True, logging.WARNING)])
def test_without_numba_one_line_says_what_to_install(fused, level, caplog, monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'numba'")

    monkeypatch.setitem(engine._LOADERS, "cpu", load)
    caplog.set_level(logging.INFO)
    trained(Automagic_CameAMP, 3, fused=fused)
    (record,) = [r for r in caplog.records if "numba" in r.getMessage()]
    assert record.levelno == level
    assert "pip install numba" in record.getMessage()


@pytest.mark.parametrize(("options", "lines"), [({}, 1), ({"fused": False}, 0), ({"factored": True}, 0)])
def test_one_line_says_why_a_first_step_takes_long(options, lines, caplog):
    caplog.set_level(logging.INFO)
    _, optimizer = trained(Automagic_CameAMP, 5, **options)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    found = [r for r in caplog.records if "compiled at the first step of each phase" in r.getMessage()]
    assert [r.levelno for r in found] == [logging.INFO] * lines


def test_true_warns_where_there_are_no_kernels(caplog, monkeypatch):
    monkeypatch.delitem(engine._LOADERS, "cpu")
    trained(Automagic_CameAMP, 3, fused=True)
    assert warnings_of(caplog) == ["fused: there are no kernels for the device 'cpu'"]


def test_without_a_folder_to_keep_results_kernels_compile_all_the_same(monkeypatch):
    from library.cameamp.step.kernels.cpu import jit

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(jit.numba, "njit", njit)
    assert jit.entry(abs) is abs


@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_a_run_changes_from_rules_to_kernels_by_a_checkpoint(cls):
    params, by_rules = trained(cls, 6, fused=False)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    by_kernels = cls(others, lr=1e-4, warmup_steps=8)
    by_kernels.load_state_dict(by_rules.state_dict())
    start = [p.detach().clone() for p in params]
    train(by_rules, params, torch.Generator().manual_seed(3), 6)
    train(by_kernels, others, torch.Generator().manual_seed(3), 6)
    for p, q, before in zip(params, others, start):
        moved = torch.linalg.vector_norm(p - before)
        assert torch.linalg.vector_norm(p - q) <= 0.02 * moved
    resumed = cls([torch.nn.Parameter(q.detach().clone()) for q in others], lr=1e-4, warmup_steps=8, fused=False)
    resumed.load_state_dict(by_kernels.state_dict())


@pytest.mark.parametrize("value", [1, "yes", None])
def test_other_values_of_the_option(value):
    with pytest.raises(TypeError, match=r"option 'fused' is .*; allowed: True, False or 'auto'"):
        Automagic_CameAMP(problem()[0], fused=value)


def test_kept_results_are_of_all_files_that_they_are_made_of():
    """numba itself would look at the caller's file alone."""
    from library.cameamp.step.kernels.cpu import jit, passes

    assert passes.step_whole._cache._cache_file._source_stamp == jit._sources()


# What a valid run may hold, and no check may take for a fault -----------------------------------------------------


@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_a_fresh_lora_whose_downs_have_gradients_of_zero(cls, caplog):
    down, up = torch.nn.Parameter(torch.randn(16, 768)), torch.nn.Parameter(torch.zeros(768, 16))
    optimizer = cls([down, up], lr=1e-4, warmup_steps=6)
    for step in range(9):
        down.grad = torch.zeros_like(down) if step < 3 else torch.randn_like(down)
        up.grad = torch.randn_like(up)
        optimizer.step()
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("weights", "grad"),
    [
        (torch.ones(64), torch.rand(64) + 0.1),
        (torch.full((64, 33), 0.5), torch.ones(64, 33)),
        (torch.tensor([torch.nan, torch.inf, 3e38] + [1.0] * 61), torch.randn(64)),
        (torch.randn(3), torch.randn(3)),
        (torch.randn(64), torch.full((64,), 3e17)),
    ],
    ids=["a norm's weights", "alike", "not finite", "few", "large gradients"],
)
@pytest.mark.filterwarnings("error")
def test_no_check_fails_where_kernels_are_right(weights, grad, caplog):
    p = torch.nn.Parameter(weights.clone())
    p.grad = grad
    optimizer = Automagic_CameAMP([p], warmup_steps=4)
    for _ in range(6):
        optimizer.step()
    assert not warnings_of(caplog)


def test_a_backward_pass_after_a_step_is_refused_as_after_any_other():
    layer = torch.nn.Linear(8, 8)
    optimizer = Automagic_CameAMP(layer.parameters())
    for _ in range(2):
        loss = layer(layer(torch.randn(4, 8))).square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_are_negated_when_they_are_read():
    results = []
    for grad in (torch._neg_view(torch.arange(1.0, 65.0)), -torch.arange(1.0, 65.0)):
        p = torch.nn.Parameter(torch.ones(64))
        p.grad = grad
        Automagic_CameAMP([p]).step()
        results.append(p)
    assert torch.equal(*results)

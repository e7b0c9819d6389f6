"""Automagic_CameAMP8bit: a quarter of the memory, the same training, and what happens where quantizing cannot."""

from __future__ import annotations

import itertools
import logging
import sys
import types

import pytest
import torch
from reliability.runs import through_torch_save, took_over
from test_checkpoint import assert_same

from benchmarks.cost import operations, state_bytes, temporary_bytes
from benchmarks.models import load, parameters
from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)
from library.cameamp import states
from library.cameamp.storage.blockwise import StoredBlockwise

# Two that are quantized with blocks of 4096 and 64, one LoRA pair, one too small, one of an awkward count.
SHAPES = [(64, 128), (65, 64), (16, 512), (512, 16), (63, 65), (41, 100)]
QUANTIZED = 4


class Training:
    """Parameters with gradients that depend on the step alone."""

    def __init__(self, optimizer_class=Automagic_CameAMP8bit, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in SHAPES]
        self.targets = [torch.randn(s, generator=generator) * 0.1 for s in SHAPES]
        self.optimizer = optimizer_class(self.params, **{"lr": 1e-3, "warmup_steps": 8, **options})
        self.taken = 0

    def run(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 + self.taken)
            for p, target in zip(self.params, self.targets):
                noise = torch.randn(p.shape, generator=generator)
                p.grad = (p.detach().float() - target + 0.1 * noise).to(p.dtype)
            self.optimizer.step()
            self.taken += 1
        return self

    def loss(self):
        return sum(((p.detach().float() - t) ** 2).sum().item() for p, t in zip(self.params, self.targets))

    def everything(self):
        states = [self.optimizer.state[p] for p in self.params]
        tensors = {f"{i} {name}": value for i, state in enumerate(states) for name, value in state.items()}
        return {**tensors, **{f"{i} weight": p.detach() for i, p in enumerate(self.params)}}


def resumed(first, optimizer_class, **options):
    return took_over(Training(optimizer_class, first.params[0].dtype, **options), first)


@pytest.mark.parametrize(("phase", "warmup_steps", "bound"), [("warm-up", 1000, 21), ("after", 0, 16)])
@pytest.mark.parametrize(("model", "limit"), [("sdxl_lora16", None), ("sd15_full", 30_000_000)])
def test_memory(model, limit, phase, warmup_steps, bound):
    shapes = load(model, limit)
    optimizer = Automagic_CameAMP8bit(parameters(shapes), warmup_steps=warmup_steps)
    optimizer.step()
    large = [p for p in optimizer.param_groups[0]["params"] if p.numel() >= 4096]
    count = sum(p.numel() for p in large)
    optimizer.state = {p: optimizer.state[p] for p in large}
    assert state_bytes(optimizer) <= 0.255 * bound * count


@pytest.mark.parametrize("warmup_steps", [0, 1000])
@pytest.mark.parametrize(
    "shapes",
    [load("sd15_lora16"), [(4096, 4096), (64, 64)], [(512, 2048)] * 6 + [(4096, 2560)] + [(512, 2048)] * 6],
    ids=["lora", "one large", "one large among others"],
)
def test_temporary_memory(shapes, warmup_steps):
    optimizer = Automagic_CameAMP8bit(parameters(shapes), warmup_steps=warmup_steps)
    optimizer.step()
    largest = max(torch.Size(shape).numel() for shape in shapes)
    assert temporary_bytes(optimizer) <= max(256 * 2**20, 6 * 4 * largest)


def test_no_read_back():
    for warmup in (8, 0):
        training = Training(warmup_steps=warmup, fused=False)
        for _ in range(10):
            training.run(1)
            assert operations(training.optimizer.step).read_backs == []


def test_state_keys():
    training = Training().run(2)
    names = ("lr_mask", "exp_avg", "exp_avg_sq", "exp_avg_res", "s")
    expected = {"step", "last_polarity_q", *(f"{name}_q" for name in names), *(f"{name}_q_scale" for name in names)}
    for index, p in enumerate(training.params):
        state = training.optimizer.state[p]
        if index < QUANTIZED:
            assert set(state) == expected
            assert all(
                state[f"{name}_q"].dtype == torch.uint8 and state[f"{name}_q"].shape == p.shape for name in names
            )
            assert state["last_polarity_q"].numel() * 8 == p.numel()
        else:
            assert set(state) == {"step", "last_polarity", *names}
    assert training.optimizer.state[training.params[0]]["exp_avg_q_scale"].shape == (2,)
    assert training.optimizer.state[training.params[1]]["exp_avg_q_scale"].shape == (65,)
    training.run(8)
    assert set(training.optimizer.state[training.params[0]]) == expected - {"last_polarity_q", "s_q", "s_q_scale"}


def test_blocksize():
    training = Training(blocksize=256).run(1)
    assert training.optimizer.state[training.params[0]]["exp_avg_q_scale"].shape == (32,)


@pytest.mark.parametrize(
    "options", [{}, {"came": False, "cautious": True, "full_finetune": True}], ids=["default", "others"]
)
def test_trains_like_32_bit(options):
    full, small = Training(Automagic_CameAMP, **options), Training(**options)
    start = full.loss()
    for _ in range(6):
        ends = full.run(10).loss(), small.run(10).loss()
        assert ends[1] == pytest.approx(ends[0], rel=0.02)
    assert ends[0] < 0.7 * start


@pytest.mark.parametrize("at", [1, 3, 4, 7, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(at, dtype):
    straight = Training(dtype=dtype).run(14)
    assert_same(
        resumed(Training(dtype=dtype).run(at), Automagic_CameAMP8bit).run(14 - at).everything(), straight.everything()
    )


@pytest.mark.parametrize("bounds", [(1e-7, 1e-3), (3e-7, 7e-4), (1e-6, 1e-2)])
def test_loading_keeps_every_code(bounds):
    """Whatever the bounds are when rounded to float32."""
    options = {"lr": 5e-4, "min_lr": bounds[0], "max_lr": bounds[1]}
    first = Training(**options).run(10)
    after = resumed(first, Automagic_CameAMP8bit, **options)
    assert_same(after.everything(), first.everything())


def test_running_out_of_memory_is_not_a_reason_for_larger_states(monkeypatch):
    def failing(self, stack, dither):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StoredBlockwise, "write", failing)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Training().run(1)


@pytest.mark.parametrize("at", [3, 6, 11])
@pytest.mark.parametrize(
    ("first", "second"),
    [(Automagic_CameAMP, Automagic_CameAMP8bit), (Automagic_CameAMP8bit, Automagic_CameAMP)],
    ids=["to 8 bits", "to 32 bits"],
)
def test_checkpoints_convert_both_ways(at, first, second, caplog):
    caplog.set_level(logging.INFO)
    before = Training(first).run(at)
    after = resumed(before, second)
    assert f"the states of {QUANTIZED} parameters are converted" in caplog.text
    for p, q in zip(before.params, after.params):
        masks = before.optimizer.get_lr_mask(p), after.optimizer.get_lr_mask(q)
        assert torch.allclose(*masks, atol=4e-6)
    expected = Training(first).run(at + 20).loss()
    assert after.run(20).loss() == pytest.approx(expected, rel=0.02)
    keys = set(after.optimizer.state[after.params[0]])
    assert ("exp_avg_q" in keys) == (second is Automagic_CameAMP8bit)
    assert ("exp_avg" in keys) == (second is Automagic_CameAMP)


@pytest.mark.parametrize("at", [3, 6, 11])
@pytest.mark.parametrize("optimizer_class", [Automagic_CameAMP8bit, Automagic_CameAMP_COptim8bit])
def test_what_was_once_too_small_for_codes_is_coded_on_loading(optimizer_class, at, monkeypatch, caplog):
    """Checkpoints from when 4,096 elements were the least hold smaller parameters in 32 bits."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("test_8bit.SHAPES", [(16, 512), (8, 64), (64, 8), (4, 40), (320,), (15, 17)])
    with monkeypatch.context() as then:
        then.setattr(states, "SMALLEST_CODED", 4096)
        before, straight = Training(optimizer_class).run(at), Training(optimizer_class).run(at + 20)
        masks = [before.optimizer.get_lr_mask(p) for p in before.params]
    held = [before.optimizer.state[p] for p in before.params]
    assert ["exp_avg_q" in state for state in held] == [True] + [False] * 5
    after = resumed(before, optimizer_class)
    assert "the states of 3 parameters are converted" in caplog.text
    held = [after.optimizer.state[p] for p in after.params]
    assert ["exp_avg_q" in state for state in held] == [True, True, True, False, True, False]
    for mask, p in zip(masks, after.params):
        assert torch.allclose(mask, after.optimizer.get_lr_mask(p), atol=4e-6)
    assert after.run(20).loss() == pytest.approx(straight.loss(), rel=0.04)


def test_momenta_of_small_parameters_convert_both_ways(monkeypatch):
    """The 8-bit contextual optimizer codes them from 256 elements on, the 32-bit one from 4,096."""
    monkeypatch.setattr("test_8bit.SHAPES", [(16, 512), (8, 64), (4, 40), (257,)])
    pair = (Automagic_CameAMP_COptim8bit, Automagic_CameAMP_COptim)
    for (first, second), expected in zip(itertools.permutations(pair), ([1, 0, 0, 0], [1, 1, 0, 1])):
        before = Training(first).run(12)
        after = resumed(before, second)
        coded = ["momentum_scale_1_q" in after.optimizer.state[p] for p in after.params]
        assert coded == expected
        assert after.run(20).loss() == pytest.approx(before.run(20).loss(), rel=0.04)


def test_converting_to_32_bits_is_exact():
    before = Training().run(5)
    after = resumed(before, Automagic_CameAMP)
    for p, q in zip(before.params, after.params):
        assert torch.equal(before.optimizer.get_lr_mask(p), after.optimizer.get_lr_mask(q))


def test_another_blocksize_is_taken_over():
    after = resumed(Training().run(5), Automagic_CameAMP8bit, blocksize=128).run(2)
    assert after.optimizer.state[after.params[0]]["exp_avg_q_scale"].shape == (64,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("exp_avg_q_scale"), "the state 'exp_avg_q_scale' is missing"),
        (lambda s: s.pop("lr_mask_q"), "the state 'lr_mask' is missing"),
        (lambda s: s.update(exp_avg_q=s["exp_avg_q"].float()), "'exp_avg_q' is torch.float32, not torch.uint8"),
        (lambda s: s.update(exp_avg_q_scale=torch.ones(3)), "'exp_avg_q_scale' has shape (3,)"),
        (lambda s: s["exp_avg_sq_q_scale"].fill_(float("nan")), "not finite"),
        (lambda s: s["exp_avg_sq_q_scale"].fill_(-1.0), "negative"),
        (lambda s: s["lr_mask_q_scale"].copy_(torch.tensor([1.0, 0.0])), "bounds"),
        (lambda s: s.update(last_polarity_q=torch.zeros(5, dtype=torch.uint8)), "'last_polarity_q' has shape (5,)"),
    ],
)
def test_damage_is_refused_and_changes_nothing(change, message):
    saved = through_torch_save(Training().run(3).optimizer.state_dict())
    change(saved["state"][0])
    second = Training().run(2)
    before = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in second.everything().items()
    }
    with pytest.raises(ValueError) as raised:
        second.optimizer.load_state_dict(saved)
    assert "parameter 0 of shape (64, 128)" in str(raised.value)
    assert message in str(raised.value)
    assert_same(second.everything(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(dtype):
    full, small = Training(Automagic_CameAMP, dtype).run(30), Training(dtype=dtype).run(30)
    assert small.loss() == pytest.approx(full.loss(), rel=0.02)


def test_parameters_moved_before_the_first_step():
    training = Training()
    for p in training.params:
        p.data = p.data.bfloat16()
    training.run(2)
    assert training.optimizer.state[training.params[0]]["exp_avg_q"].dtype == torch.uint8


def test_gradients_over_six_orders_of_magnitude_in_one_block():
    """A random quadratic whose curvatures span six orders of magnitude; a tenth never has a gradient."""

    def run(optimizer_class):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
        curvature = 10 ** (-6 * torch.rand(64, 64, generator=generator))
        curvature[torch.rand(64, 64, generator=generator) < 0.1] = 0.0
        optimizer = optimizer_class([p], lr=1e-3, warmup_steps=100, weight_decay=0.0)
        start, largest = p.detach().clone(), []
        for number in range(200):
            p.grad = curvature * (p.detach() + 0.1 * torch.randn(64, 64, generator=generator))
            before = p.detach().clone()
            optimizer.step()
            largest.append((p - before).abs().max().item())
            if number == 48:  # the last early step; orthogonal ones move every weight a little
                start = p.detach().clone()
        return largest, (p - start)[curvature == 0.0]

    full, _ = run(Automagic_CameAMP)
    small, idle = run(Automagic_CameAMP8bit)
    assert all(a <= 3 * b for a, b in zip(small, full))
    assert not idle.any()


@pytest.mark.parametrize(
    ("start", "flips"),
    [(1e-7, False), (3.9e-4, False), (1e-3, True), (7e-4, True)],
    ids=["from min_lr", "to max_lr", "from max_lr", "between"],
)
def test_the_mask_moves_by_a_bump_on_average(start, flips):
    p = torch.nn.Parameter(torch.randn(256, 256))
    optimizer = Automagic_CameAMP8bit([p], lr=start, warmup_steps=1000)
    for number in range(201):
        p.grad = torch.ones(256, 256) * (-1 if flips and number % 2 else 1)
        optimizer.step()
    moved = (optimizer.get_lr_mask(p).double().mean().item() - start) / 200
    assert moved == pytest.approx(-3e-6 if flips else 3e-6, rel=0.05)


def test_a_frozen_mask_does_not_move():
    training = Training().run(9)
    masks = [training.optimizer.get_lr_mask(p) for p in training.params]
    training.run(20)
    assert all(torch.equal(a, training.optimizer.get_lr_mask(p)) for a, p in zip(masks, training.params))


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(RuntimeError, match=r"pip install 'bitsandbytes.*Automagic_CameAMP does the same"):
        Automagic_CameAMP8bit([torch.nn.Parameter(torch.ones(2))])
    Automagic_CameAMP([torch.nn.Parameter(torch.ones(2))])


def test_with_a_bitsandbytes_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", types.ModuleType("bitsandbytes.functional"))
    with pytest.raises(RuntimeError, match="pip install"):
        Automagic_CameAMP8bit([torch.nn.Parameter(torch.ones(2))])


def test_where_quantizing_fails_states_stay_in_32_bits(monkeypatch, caplog):
    write = StoredBlockwise.write

    def failing(self, stack, dither):
        if stack.shape[-1] == 512:
            raise NotImplementedError("no kernel for this device\nand more")
        write(self, stack, dither)

    monkeypatch.setattr(StoredBlockwise, "write", failing)
    caplog.set_level(logging.WARNING)
    full, small = Training(Automagic_CameAMP).run(30), Training().run(30)
    (line,) = [r.message for r in caplog.records if r.name.startswith("library")]
    assert "(16, 512)" in line
    assert "no kernel for this device" in line
    assert "exp_avg" in small.optimizer.state[small.params[2]]
    assert "exp_avg_q" in small.optimizer.state[small.params[0]]
    assert small.loss() == pytest.approx(full.loss(), rel=0.02)
    assert_same(resumed(small, Automagic_CameAMP8bit).run(3).everything(), small.run(3).everything())


def test_accumulated_drift_of_elements_without_gradient_is_nothing():
    p = torch.nn.Parameter(torch.randn(64, 64))
    start = p.detach().clone()
    optimizer = Automagic_CameAMP8bit([p], lr=1e-3, warmup_steps=0)
    for _ in range(100):
        p.grad = torch.randn(64, 64)
        p.grad[:, ::2] = 0.0
        optimizer.step()
    assert torch.equal(p[:, ::2], start[:, ::2])
    assert not torch.equal(p[:, 1::2], start[:, 1::2])

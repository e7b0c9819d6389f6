"""Stochastic rounding: unbiased, reproducible, and no one else's random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.automagic_cameamp import Automagic_CameAMP
from library.cameamp import rounding
from library.cameamp.rounding import Dither, stochastic_round, uniform_noise

DTYPES = [torch.bfloat16, torch.float16]


def rounded(x, dtype, step=1, positions=None):
    positions = torch.arange(x.shape[0], dtype=torch.int32) if positions is None else positions
    return stochastic_round(x.clone(), dtype, Dither(positions, step))


@pytest.mark.parametrize("dtype", DTYPES)
@given(exponent=st.integers(-20, 14), seed=st.integers(0, 1000))
def test_one_of_the_two_neighbours(dtype, exponent, seed):
    x = (torch.rand(1, 64, 4, generator=torch.Generator().manual_seed(seed)) + 1) * 2.0**exponent
    result = rounded(x, dtype).float()
    spacing = max(2.0**exponent * torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 0.0)
    assert ((result - x).abs() < spacing).all()
    assert torch.equal((result / spacing).round() * spacing, result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_representable_values_stay(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 65504.0 if dtype == torch.float16 else 3e38, 2.0**-24, -(2.0**-20)])
    values = values.to(dtype).float().view(1, -1, 1)
    for step in range(20):
        assert torch.equal(rounded(values, dtype, step).float(), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0 + 1e-4, -3.14159, 0.1, 7e-6, 1e-7, 123.456])
def test_unbiased(dtype, value):
    x = torch.full((4, 500, 500), value)
    results = rounded(x, dtype).double()
    spread = results.std().item() / x.numel() ** 0.5
    exact = x.double().mean().item()
    # The noise has 2^13 levels, so a bias of half a level of one unit in the last place is its resolution.
    unit = (results.max() - results.min()).item()
    assert abs(results.mean().item() - exact) <= 5 * spread + unit * 2.0**-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_stays_finite(dtype):
    x = torch.tensor([3.4e38, -3.4e38, 65519.0, 1e-45, -1e-40]).view(1, -1, 1)
    assert all(rounded(x, dtype, step).isfinite().all() for step in range(50))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_values_stay_tiny(dtype, flush, monkeypatch):
    """Also where `ldexp` multiplies by a power of two that must be a float32 itself, as PyTorch 2.4's does."""
    monkeypatch.setattr(torch, "ldexp", lambda x, exponent: x * torch.pow(2.0, exponent.float()))
    x = torch.tensor([1e-45, -1e-40, 1e-38, -1e-37, 5e-37, 0.0]).view(1, -1, 1)
    try:
        torch.set_flush_denormal(flush)
        for step in range(50):
            result = rounded(x, dtype, step)
            assert (result.double() - x.double()).abs().max() <= (2.0**-126 if dtype == torch.bfloat16 else 2.0**-24)
    finally:
        torch.set_flush_denormal(False)


def test_noise_is_uniform_and_independent():
    noise = uniform_noise(Dither(torch.arange(8, dtype=torch.int32), 3), 0, 25_000)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean().item() - 0.5) < 0.003
    assert abs(noise.var().item() - 1 / 12) < 0.002
    rows = noise.flatten(1)
    correlation = torch.corrcoef(torch.cat([rows, rows.roll(1, dims=1)]))
    assert (correlation - torch.eye(16)).abs().max() < 0.03
    histogram = torch.histc(noise, bins=64, min=0, max=1)
    assert (histogram / histogram.mean() - 1).abs().max() < 0.08


def test_noise_depends_on_step_and_position_alone():
    positions = torch.tensor([4, 9], dtype=torch.int32)
    noise = uniform_noise(Dither(positions, 7), 0, 30)
    assert torch.equal(noise, uniform_noise(Dither(positions, 7), 0, 30))
    assert torch.equal(noise[1:], uniform_noise(Dither(positions[1:], 7), 0, 30))
    assert torch.equal(noise[:, 12:], uniform_noise(Dither(positions, 7), 12, 18))
    assert not torch.equal(noise, uniform_noise(Dither(positions, 8), 0, 30))
    assert not torch.equal(noise[0], noise[1])


def test_parts_do_not_change_the_result(monkeypatch):
    x = torch.randn(2, 30, 7)
    dither = Dither(torch.tensor([1, 2], dtype=torch.int32), 5)
    whole = stochastic_round(x, torch.bfloat16, dither)
    monkeypatch.setattr(rounding, "_PART", 64)
    assert torch.equal(stochastic_round(x, torch.bfloat16, dither), whole)


def test_small_steps_add_up():
    """Steps a hundredth of what bfloat16 can hold move the weights on average all the same."""
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    q = torch.nn.Parameter(torch.ones(64, 64))
    optimizers = [Automagic_CameAMP([w], lr=1e-5, warmup_steps=0, weight_decay=0.0) for w in (p, q)]
    for _ in range(60):
        grad = torch.ones(64, 64) + torch.randn(64, 64)
        for w, optimizer in zip((p, q), optimizers):
            w.grad = grad.to(w.dtype)
            optimizer.step()
    moved, expected = (p.float() - 1).mean().item(), (q - 1).mean().item()
    assert expected < -1e-4
    assert moved == pytest.approx(expected, rel=0.1)


def test_global_random_numbers_are_never_drawn():
    params = [torch.nn.Parameter(torch.randn(8, 8).to(dtype)) for dtype in (torch.float32, *DTYPES)]
    optimizer = Automagic_CameAMP(params, warmup_steps=4)
    before = torch.get_rng_state()
    for _ in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)

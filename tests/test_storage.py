"""How states are kept: nearest codes, exact zeros, unbiased masks, packed bits."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.cameamp.rounding import Dither
from library.cameamp.storage import blockwise
from library.cameamp.storage.bits import Bits
from library.cameamp.storage.blockwise import Blockwise, block_of
from library.cameamp.storage.linear import Linear


def dither(n=1, step=1):
    return Dither(torch.arange(n, dtype=torch.int32), step)


def kept(storage, values, step=1):
    """Buffers that hold `values`, (n, rows, columns)."""
    n, rows, columns = values.shape
    buffers = storage.allocate("x", torch.Size((rows, columns)), n, 0.0, dither(n))
    storage.write("x", buffers, values.clone(), dither(n, step))
    return buffers


def roundtrip(storage, values, step=1):
    return storage.read("x", kept(storage, values, step), *values.shape[1:])


def spread_values(count, signed, seed=0):
    """Values over nine decades, the largest of them 1."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-9 * torch.rand(count, generator=generator))
    if signed:
        values *= torch.rand(count, generator=generator).sub(0.5).sign()
    values[0] = 1.0
    return values


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_value_gets_its_nearest_code(signed, seed):
    values = spread_values(1 << 15, signed, seed)
    codes = kept(Blockwise(signed, root=False, block=1 << 15), values.view(1, 1, -1))["x_q"].flatten().long()
    table = bnb.create_dynamic_map(signed=signed).double()
    distances = (values.double().unsqueeze(1) - table).abs()
    chosen = distances.gather(1, codes.unsqueeze(1)).squeeze(1)
    assert (chosen <= distances.amin(dim=1) + values.abs().double() * 1e-7).all()


@pytest.mark.parametrize("signed", [True, False])
def test_values_of_the_map_are_exact(signed):
    table = bnb.create_dynamic_map(signed=signed)
    result = roundtrip(Blockwise(signed, root=False, block=256), table.view(1, 1, -1))
    assert torch.equal(result.flatten(), table)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_zeros_stay_zero(signed, root):
    storage = Blockwise(signed, root, block=64)
    values = torch.zeros(1, 4, 64)
    values[0, 1] = torch.rand(64)
    values[0, 1, ::2] = 0.0
    values[0, 2, 5] = 1e-30
    if signed:
        values[0, 1, ::2] = -0.0
    result = roundtrip(storage, values)
    assert torch.equal(result == 0, values == 0)


@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_decodes_what_was_written(signed):
    values = torch.randn(3, 8, 64) if signed else torch.rand(3, 8, 64)
    storage = Blockwise(signed, root=False, block=128)
    buffers = kept(storage, values)
    state = bnb.QuantState(
        absmax=buffers["x_q_scale"].flatten(),
        code=bnb.create_dynamic_map(signed=signed),
        blocksize=128,
        dtype=torch.float32,
    )
    theirs = bnb.dequantize_blockwise(buffers["x_q"].view(-1), state)
    assert torch.allclose(theirs.view_as(values), storage.read("x", buffers, 8, 64), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e18])
def test_scales_of_any_size(scale):
    values = torch.rand(1, 2, 64) * scale
    result = roundtrip(Blockwise(signed=False, root=False, block=64), values)
    assert ((result - values).abs() <= 0.01 * values.amax(dim=2, keepdim=True)).all()


def test_the_root_spans_twice_the_magnitudes():
    values = spread_values(4096, signed=False).square().view(1, 1, -1)  # 18 decades
    errors = [(roundtrip(Blockwise(False, root, 4096), values) / values - 1).abs() for root in (True, False)]
    kept_magnitudes = [(error < 0.5).float().mean() for error in errors]
    assert kept_magnitudes[0] > 1.5 * kept_magnitudes[1]


def test_parts_do_not_change_the_codes(monkeypatch):
    values = torch.randn(2, 16, 64)
    storage = Blockwise(signed=True, root=False, block=64)
    whole = kept(storage, values)
    monkeypatch.setattr(blockwise, "_PART", 100)
    parts = kept(storage, values)
    assert torch.equal(whole["x_q"], parts["x_q"])
    assert torch.equal(storage.read("x", whole, 16, 64), storage.read("x", parts, 16, 64))


@given(st.integers(1, 1 << 24), st.sampled_from([64, 256, 1024, 4096]))
def test_blocks_divide(count, largest):
    block = block_of(count, largest)
    if block is None:
        assert count % 64
    else:
        assert 64 <= block <= largest
        assert count % block == 0
        assert block == largest or count % (2 * block)


def test_linear_is_exact_at_its_ends_and_never_leaves_them():
    storage = Linear(1e-7, 1e-3)
    values = torch.tensor([1e-7, 1e-3, 1e-7, 1e-3]).view(1, 1, 4)
    for step in range(50):
        assert torch.equal(roundtrip(storage, values, step), values)
    inside = torch.rand(1, 40, 40) * (1e-3 - 1e-7) + 1e-7
    result = roundtrip(storage, inside)
    assert result.min() >= torch.tensor(1e-7)
    assert result.max() <= torch.tensor(1e-3)


@pytest.mark.parametrize("value", [1e-6, 3.3e-4, 5e-4, 9.98e-4])
def test_linear_is_unbiased(value):
    values = torch.full((1, 1000, 1000), value)
    result = roundtrip(Linear(1e-7, 1e-3), values)
    step = (1e-3 - 1e-7) / 255
    assert (result - values).abs().max() <= step
    assert abs(result.double().mean().item() - value) < 3 * step / 1000


def test_linear_with_equal_bounds():
    values = torch.full((1, 8, 8), 1e-4)
    assert torch.allclose(roundtrip(Linear(1e-4, 1e-4), values), values)


def test_linear_reads_the_bounds_it_was_written_with():
    buffers = kept(Linear(0.0, 1e-3), torch.full((2, 8, 8), 1e-3))
    assert torch.allclose(Linear(0.0, 5e-3).read("x", buffers, 8, 8), torch.full((2, 8, 8), 1e-3))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_bits(n, rows, seed):
    bits = torch.rand(n, rows, 8, generator=torch.Generator().manual_seed(seed)) > 0.5
    buffers = Bits().allocate("x", torch.Size((rows, 8)), n, 0.0, dither(n))
    assert not Bits().read("x", buffers, rows, 8).any()
    Bits().write("x", buffers, bits, dither(n))
    assert torch.equal(Bits().read("x", buffers, rows, 8), bits)
    assert buffers["x_q"].numel() == n * rows

"""How states are stored: nearest codes, exact zeros, unbiased masks, packed bits."""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.cameamp.rounding import Dither
from library.cameamp.storage import blockwise
from library.cameamp.storage.bits import Bits
from library.cameamp.storage.blockwise import Blockwise, block_of
from library.cameamp.storage.full import Full
from library.cameamp.storage.linear import Linear
from library.cameamp.storage.low_rank import LowRank
from library.cameamp.storage.nibbles import Nibbles


def dither(n=1, step=1):
    return Dither(torch.arange(n, dtype=torch.int32), step)


def stored(fmt, values, step=1):
    """A state that holds `values`, (n, rows, columns)."""
    n, rows, columns = values.shape
    state = fmt.new(n, torch.Size((rows, columns)), values.device)
    state.write(values.clone(), dither(n, step))
    return state


def roundtrip(fmt, values, step=1):
    return stored(fmt, values, step).read()


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
    codes = stored(Blockwise(signed, root=False, block=1 << 15), values.view(1, 1, -1)).tensors[0].flatten().long()
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
    fmt = Blockwise(signed, root, block=64)
    values = torch.zeros(1, 4, 64)
    values[0, 1] = torch.rand(64)
    values[0, 1, ::2] = 0.0
    values[0, 2, 5] = 1e-30
    if signed:
        values[0, 1, ::2] = -0.0
    result = roundtrip(fmt, values)
    assert torch.equal(result == 0, values == 0)


@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_decodes_what_was_written(signed):
    values = torch.randn(3, 8, 64) if signed else torch.rand(3, 8, 64)
    fmt = Blockwise(signed, root=False, block=128)
    ours = stored(fmt, values)
    codes, scale = ours.tensors
    state = bnb.QuantState(
        absmax=scale.flatten(),
        code=bnb.create_dynamic_map(signed=signed),
        blocksize=128,
        dtype=torch.float32,
    )
    theirs = bnb.dequantize_blockwise(codes.view(-1), state)
    assert torch.allclose(theirs.view_as(values), ours.read(), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e18])
def test_scales_of_any_size(scale):
    values = torch.rand(1, 2, 64) * scale
    result = roundtrip(Blockwise(signed=False, root=False, block=64), values)
    assert ((result - values).abs() <= 0.01 * values.amax(dim=2, keepdim=True)).all()


def test_the_root_spans_twice_the_magnitudes():
    values = spread_values(4096, signed=False).square().view(1, 1, -1)  # 18 decades
    errors = [(roundtrip(Blockwise(False, root, 4096), values) / values - 1).abs() for root in (True, False)]
    surviving = [(error < 0.5).float().mean() for error in errors]
    assert surviving[0] > 1.5 * surviving[1]


def test_parts_do_not_change_the_codes(monkeypatch):
    values = torch.randn(2, 16, 64)
    fmt = Blockwise(signed=True, root=False, block=64)
    whole = stored(fmt, values)
    values_of_whole = whole.read()
    monkeypatch.setattr(blockwise, "_PART", 100)
    parts = stored(fmt, values)
    assert torch.equal(whole.tensors[0], parts.tensors[0])
    assert torch.equal(values_of_whole, parts.read())


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
    fmt = Linear(1e-7, 1e-3)
    values = torch.tensor([1e-7, 1e-3, 1e-7, 1e-3]).view(1, 1, 4)
    for step in range(50):
        assert torch.equal(roundtrip(fmt, values, step), values)
    inside = torch.rand(1, 40, 40) * (1e-3 - 1e-7) + 1e-7
    result = roundtrip(fmt, inside)
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
    state = stored(Linear(0.0, 1e-3), torch.full((2, 8, 8), 1e-3))
    other = Linear(0.0, 5e-3).over(state.tensors, torch.Size((8, 8)))
    assert torch.allclose(other.read(), torch.full((2, 8, 8), 1e-3))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_bits(n, rows, columns, seed):
    bits = torch.rand(n, rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    state = Bits().new(n, torch.Size((rows, columns)), bits.device)
    assert not state.read().any()
    state.write(bits, dither(n))
    assert torch.equal(state.read(), bits)
    assert state.tensors[0].numel() == n * math.ceil(rows * columns / 8)


@pytest.mark.parametrize(
    "fmt",
    [Full(), Full(torch.bool), Bits(), Linear(0.0, 1e-3), Blockwise(True, False, 64), Nibbles(), LowRank(8, 64, 2)],
    ids=lambda fmt: type(fmt).__name__,
)
def test_a_format_says_what_it_takes(fmt):
    """Sizes, dtypes and bytes, and it recognizes its own tensors."""
    shape = torch.Size((8, 64))
    state = fmt.new(3, shape, torch.device("cpu"))
    assert fmt.suffixes == tuple(fmt.parts(shape))
    assert sum(tensor.nbytes for tensor in state.tensors) == 3 * fmt.bytes(shape)
    tensors = {suffix: tensor[0] for suffix, tensor in zip(fmt.suffixes, state.tensors)}
    if not isinstance(fmt, Linear):  # Its bounds are written with the first values.
        assert fmt.as_saved(tensors, shape) == fmt
    assert not state.read().any()
    with pytest.raises(ValueError, match=r"^[a-z_]*: has"):
        fmt.as_saved({suffix: tensor.flatten()[1:] for suffix, tensor in tensors.items()}, shape)

"""States of few bits on their way between memory and registers.

Formats and exactness are those of `storage/`; the same numbers give the same codes on every device. Nothing here may be
contracted into fused products and sums, which would round differently: `passes.py` compiles all kernels without.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....storage import nibbles
from .. import table as fields
from . import rules
from .elements import (
    ADDRESS,
    BLOCK,
    FLOAT,
    KIND,
    POSITION,
    SCALE,
    STATES,
    in_whole_tensor,
    pointer_to,
    room_of,
    size_of,
)

# How a state is coded, where it is.
SIGNED, ROOT, EVEN = tl.constexpr(fields.SIGNED), tl.constexpr(fields.ROOT), tl.constexpr(fields.EVEN)
FOUR_BITS, LOW_RANK = tl.constexpr(fields.FOUR_BITS), tl.constexpr(fields.LOW_RANK)
LOW_RANK_OF_SHARD = tl.constexpr(fields.LOW_RANK_OF_SHARD)
_BOOL = tl.constexpr(fields.BOOL)
_BFLOAT16 = tl.constexpr(fields.BFLOAT16)

_STEP, _CODE_LOW = tl.constexpr(rules.STEP), tl.constexpr(rules.CODE_LOW)
_CODES_A_UNIT, _LARGEST_CODE = tl.constexpr(rules.CODES_A_UNIT), tl.constexpr(float(rules.LARGEST_CODE))

_BASE = tl.constexpr(nibbles.BASE)

# The smallest block, and the lengths of a map and of a table of first codes.
_SMALLEST_BLOCK, _SMALLEST_BITS = tl.constexpr(64), tl.constexpr(6)
_MAP = tl.constexpr(256)
_FIRST = tl.constexpr(65536)


# Noise ----------------------------------------------------------------------------------------------------------


@triton.jit
def _mix(x):
    """As of `rounding.py`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise(row, numbers, offsets, RULES: tl.constexpr):
    """Noise in [0, 1), a pure function of the step, the tensor and the element; as `rounding.uniform_noise`."""
    step = tl.load(numbers + _STEP).to(tl.uint32, bitcast=True)
    stream = _mix(tl.load(row + POSITION).to(tl.uint32) + step * 0x9E3779B1)
    element = in_whole_tensor(row, offsets, RULES).to(tl.uint32)
    return (_mix(stream + element) & 8191).to(tl.float32) * 0.0001220703125


@triton.jit
def stochastic_round(x, noise, FORMAT: tl.constexpr):
    """Numbers that bfloat16 or float16 can hold, up or down with the probabilities that keep the mean."""
    significand: tl.constexpr = 8 if FORMAT == _BFLOAT16 else 11
    smallest: tl.constexpr = -118 if FORMAT == _BFLOAT16 else -13
    largest: tl.constexpr = 3.3895313892515355e38 if FORMAT == _BFLOAT16 else 65504.0
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    place = tl.maximum(exponent, smallest) - significand
    last_place = ((place + 127) << 23).to(tl.float32, bitcast=True)
    places_a_unit = ((127 - place) << 23).to(tl.float32, bitcast=True)
    rounded = tl.floor(x * places_a_unit + noise) * last_place
    return tl.minimum(tl.maximum(rounded, -largest), largest)


# A byte an element ----------------------------------------------------------------------------------------------


@triton.jit
def load_state(row, STATE: tl.constexpr, CODE: tl.constexpr, maps, offsets, mask, RULES: tl.constexpr):
    """A state as float32.

    Args:
        row: the tensor's row in the table.
        STATE: the state's number.
        CODE: how it is written where it is coded.
        maps: the values of the signed map, and those of the unsigned one.
        offsets, mask: the elements.
        RULES: what the kernel is compiled for.
    """
    entry = row + STATES + 3 * STATE
    address = tl.load(entry + ADDRESS)
    if RULES.coded:
        if tl.load(entry + KIND) == FLOAT:
            x = tl.load(pointer_to(address, tl.float32, RULES) + offsets, mask, other=0.0)
        else:
            code = tl.load(pointer_to(address, tl.uint8, RULES) + offsets, mask, other=0).to(tl.int32)
            x = _decode(row, tl.load(entry + SCALE), code, CODE, maps, offsets, mask, RULES)
    else:
        x = tl.load(pointer_to(address, tl.float32, RULES) + offsets, mask, other=0.0)
    return x


@triton.jit
def _decode(row, scale_address, code, CODE: tl.constexpr, maps, offsets, mask, RULES: tl.constexpr):
    scales = scale_address.to(tl.pointer_type(tl.float32))
    if CODE == EVEN:
        low, high = tl.load(scales), tl.load(scales + 1)
        # As torch.lerp does it: from the nearer end.
        share = tl.math.div_rn(code.to(tl.float32), _LARGEST_CODE)
        x = tl.where(share < 0.5, low + share * (high - low), high - (high - low) * (1.0 - share))
    else:
        scale = tl.load(scales + _block_of(row, offsets, RULES), mask, other=0.0)
        start: tl.constexpr = 0 if CODE == SIGNED else _MAP
        x = tl.load(maps + start + code) * scale
        if CODE == ROOT:
            x = x * x
    return x


@triton.jit
def store_state(
    row, STATE: tl.constexpr, CODE: tl.constexpr, numbers, maps, firsts, offsets, mask, x, SPAN: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """Write a state down; `offsets` are SPAN in a row, which are whole blocks, or the one block of `elements_of`.

    Args:
        numbers: those of the step.
        maps: the values of both maps, and the midpoints between their values.
        firsts: for the upper 16 bits of a float32, the code of the smallest number that has them; of both maps.
        x: the state.

    The others are as of `load_state`.
    """
    entry = row + STATES + 3 * STATE
    address = tl.load(entry + ADDRESS)
    if RULES.coded:
        if tl.load(entry + KIND) == FLOAT:
            tl.store(pointer_to(address, tl.float32, RULES) + offsets, x, mask)
        else:
            if CODE == EVEN:
                place = (x - tl.load(numbers + _CODE_LOW)) * tl.load(numbers + _CODES_A_UNIT)
                place = tl.floor(place + noise(row, numbers, offsets, RULES))
                code = tl.minimum(tl.maximum(place, 0.0), _LARGEST_CODE).to(tl.int32)
            else:
                code = _encode(row, tl.load(entry + SCALE), CODE, maps, firsts, offsets, mask, x, SPAN, RULES)
            tl.store(pointer_to(address, tl.uint8, RULES) + offsets, code.to(tl.uint8), mask)
    else:
        tl.store(pointer_to(address, tl.float32, RULES) + offsets, x, mask)


@triton.jit
def _block_of(row, offsets, RULES: tl.constexpr):
    """In which block each element is. In a shard a block is of any size, so that it begins and ends between rows."""
    if RULES.sharded:
        block = offsets // tl.maximum(tl.load(row + BLOCK).to(tl.int32), 1)
    else:
        block = offsets >> _block_bits(row)
    return block


@triton.jit
def _block_bits(row):
    """The binary logarithm of a tensor's block: a float's exponent."""
    return (tl.load(row + BLOCK).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _encode(
    row, scale_address, CODE: tl.constexpr, maps, firsts, offsets, mask, x, SPAN: tl.constexpr, RULES: tl.constexpr
):
    """The code of the value nearest to each element, in its block's unit; writes the units."""
    scales = scale_address.to(tl.pointer_type(tl.float32))
    if CODE == ROOT:
        x = tl.sqrt_rn(x)
    magnitude = tl.abs(tl.where(mask, x, 0.0))
    if RULES.sharded:
        scale = tl.max(magnitude, axis=0)
        tl.store(scales + _block_of(row, tl.min(offsets, axis=0), RULES), scale)
        unit = tl.broadcast_to(tl.where(scale > 0, scale, 1.0), (SPAN,))
    else:
        # The largest magnitude of each 64 elements, and then of those 64s that lie in the same block.
        parts: tl.constexpr = SPAN // _SMALLEST_BLOCK
        largest = tl.max(tl.reshape(magnitude, (parts, _SMALLEST_BLOCK)), axis=1)
        numbers = tl.arange(0, parts)
        shift = _block_bits(row) - _SMALLEST_BITS
        together = (numbers >> shift)[:, None] == (numbers >> shift)[None, :]
        scale = tl.max(tl.where(together, largest[None, :], 0.0), axis=1)
        places = (tl.min(offsets, axis=0) >> _SMALLEST_BITS) + numbers
        begins = ((places >> shift) << shift == places) & (places << _SMALLEST_BITS < size_of(row, RULES))
        tl.store(scales + (places >> shift), scale, begins)
        unit = tl.where(scale > 0, scale, 1.0)
        unit = tl.reshape(tl.broadcast_to(unit[:, None], (parts, _SMALLEST_BLOCK)), (SPAN,))
    x = tl.math.div_rn(x, unit)
    number: tl.constexpr = 0 if CODE == SIGNED else 1
    upper = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    code = tl.load(firsts + number * _FIRST + upper).to(tl.int32)
    # Numbers with the same upper bits lie so close together that at most one midpoint falls between them.
    beyond = x > tl.load(maps + (2 + number) * _MAP + code)
    return code + beyond.to(tl.int32)


# A bit an element -----------------------------------------------------------------------------------------------


@triton.jit
def load_truths(row, STATE: tl.constexpr, offsets, mask, RULES: tl.constexpr):
    """A state of yes or no, as 0 or 1: a byte an element, or byte j for the elements j, j + k, ..., j + 7 k."""
    entry = row + STATES + 3 * STATE
    pointer = tl.load(entry + ADDRESS).to(tl.pointer_type(tl.uint8))
    if tl.load(entry + KIND) == _BOOL:
        truths = tl.load(pointer + offsets, mask, other=0).to(tl.int32)
    else:
        count = (room_of(row, RULES) + 7) // 8
        truths = (tl.load(pointer + offsets % count, mask, other=0).to(tl.int32) >> (offsets // count)) & 1
    return truths


@triton.jit
def store_truths(row, STATE: tl.constexpr, offsets, mask, truths):
    """Write such a state where it has a byte an element; else it stays as it is."""
    entry = row + STATES + 3 * STATE
    if tl.load(entry + KIND) == _BOOL:
        pointer = tl.load(entry + ADDRESS).to(tl.pointer_type(tl.uint8))
        tl.debug_barrier()  # All threads have read the old ones, on which the new ones do not depend.
        tl.store(pointer + offsets, truths.to(tl.uint8), mask)


# Four bits an element -------------------------------------------------------------------------------------------


@triton.jit
def low_level(byte):
    """The level of the first of a byte's two elements."""
    return byte - high_level(byte) * _BASE


@triton.jit
def high_level(byte):
    """The level of the second."""
    return (byte + _BASE // 2) >> 4


@triton.jit
def load_levels(address, room, offsets, mask):
    """The levels, -7 to 7: byte j holds those of element j and, sixteenfold, of element j + half."""
    half = (room + 1) // 2
    second = offsets >= half
    pointer = address.to(tl.pointer_type(tl.int8))
    byte = tl.load(pointer + tl.where(second, offsets - half, offsets), mask, other=0).to(tl.int32)
    return tl.where(second, high_level(byte), low_level(byte)).to(tl.float32)

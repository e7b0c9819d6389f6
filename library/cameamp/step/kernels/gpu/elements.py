"""Gradients, weights and states, read and written where they are.

A table has a row for each tensor, see `table.py`. Elements are chosen by their offsets in the flat tensor, of any shape
of block; those that a mask excludes are read as 0 and not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import table as fields

FIELDS = tl.constexpr(fields.FIELDS)
STATES = tl.constexpr(fields.STATES)
KIND, ADDRESS, SCALE = tl.constexpr(fields.KIND), tl.constexpr(fields.ADDRESS), tl.constexpr(fields.SCALE)
NUMEL, ROWS, COLUMNS = tl.constexpr(fields.NUMEL), tl.constexpr(fields.ROWS), tl.constexpr(fields.COLUMNS)
POSITION, BLOCK = tl.constexpr(fields.POSITION), tl.constexpr(fields.BLOCK)
WHOLE_NUMEL = tl.constexpr(fields.WHOLE_NUMEL)
_FIRST, _ROOM = tl.constexpr(fields.FIRST), tl.constexpr(fields.SPAN)
GRAD, WEIGHT, SAMPLE = tl.constexpr(fields.GRAD), tl.constexpr(fields.WEIGHT), tl.constexpr(fields.SAMPLE)
FLOAT = tl.constexpr(fields.FLOAT)

_FLOAT32, _BFLOAT16 = tl.constexpr(fields.FLOAT32), tl.constexpr(fields.BFLOAT16)
_LARGEST_MAGNITUDE = tl.constexpr(1e18)


@triton.jit
def size_of(row, RULES: tl.constexpr):
    """How many elements a tensor has."""
    numel = tl.load(row + NUMEL).to(tl.int32)
    if RULES.aligned:
        numel = tl.multiple_of(numel, 16)
    return numel


@triton.jit
def room_of(row, RULES: tl.constexpr):
    """For how many elements there is room where those that lie far apart share a byte."""
    room = size_of(row, RULES)
    if RULES.sharded:
        room = tl.load(row + _ROOM).to(tl.int32)
    return room


@triton.jit
def elements_of(row, span, SPAN: tl.constexpr, RULES: tl.constexpr):
    """The offsets of one span of a tensor, and which of them there are. Where a shard is in codes it is one block."""
    local = tl.arange(0, SPAN)
    offsets = span * SPAN + local
    mask = offsets < size_of(row, RULES)
    if RULES.sharded and RULES.coded:
        block = tl.load(row + BLOCK).to(tl.int32)
        length = tl.where(block > 0, block, SPAN)
        offsets = span * length + local
        mask = (local < length) & (offsets < size_of(row, RULES))
    return offsets, mask


@triton.jit
def in_whole_tensor(row, offsets, RULES: tl.constexpr):
    """Which elements of the whole tensor these are."""
    elements = offsets
    if RULES.sharded:
        elements = tl.load(row + _FIRST) + offsets
    return elements


@triton.jit
def seen_by_context(row, offsets, mask, every, RULES: tl.constexpr):
    """Where elements are in what the context sees, and which of them it sees: every `every`-th."""
    elements = in_whole_tensor(row, offsets, RULES)
    return tl.load(row + SAMPLE) + elements // every, mask & (elements % every == 0)


@triton.jit
def pointer_to(address, dtype: tl.constexpr, RULES: tl.constexpr):
    """An address from a table as a pointer; the compiler is told of its alignment, for wider loads."""
    pointer = address.to(tl.pointer_type(dtype))
    if RULES.aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_floats(address, offsets, mask, FORMAT: tl.constexpr, RULES: tl.constexpr):
    """Numbers of any floating-point format, as float32."""
    if FORMAT == _FLOAT32:
        x = tl.load(pointer_to(address, tl.float32, RULES) + offsets, mask, other=0.0)
    elif FORMAT == _BFLOAT16:
        # The upper half of a float32's bits. Older GPUs have no bfloat16 of their own.
        bits = tl.load(pointer_to(address, tl.uint16, RULES) + offsets, mask, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(pointer_to(address, tl.float16, RULES) + offsets, mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_floats(address, offsets, mask, x, FORMAT: tl.constexpr, RULES: tl.constexpr):
    """Write float32 numbers that the format can hold exactly."""
    if FORMAT == _FLOAT32:
        tl.store(pointer_to(address, tl.float32, RULES) + offsets, x, mask)
    elif FORMAT == _BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True) >> 16
        tl.store(pointer_to(address, tl.uint16, RULES) + offsets, bits.to(tl.uint16), mask)
    else:
        tl.store(pointer_to(address, tl.float16, RULES) + offsets, x.to(tl.float16), mask)


@triton.jit
def gradient(row, offsets, mask, RULES: tl.constexpr):
    """The gradient as it is: elements may not be usable."""
    return load_floats(tl.load(row + GRAD), offsets, mask, RULES.gradients, RULES)


@triton.jit
def is_usable(g):
    """Whether elements are finite, and at most 1e18 in magnitude; false for NaN."""
    return tl.abs(g) <= _LARGEST_MAGNITUDE


@triton.jit
def usable_gradient(row, offsets, mask, RULES: tl.constexpr):
    """The gradient, with 0 for elements that are not usable."""
    g = gradient(row, offsets, mask, RULES)
    return tl.where(is_usable(g), g, 0.0)


@triton.jit
def weights(row, offsets, mask, RULES: tl.constexpr):
    """The weights."""
    return load_floats(tl.load(row + WEIGHT), offsets, mask, RULES.weights, RULES)

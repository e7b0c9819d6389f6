"""Momenta of low rank: one subspace iteration of each that is due, as `storage/low_rank.py` does it.

Beside the codes, a momentum has a memory of floats while it is updated: the rows of the left factor, those of the right
one, what of the old left factor lies along the new one, and the units of the left one's codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....storage import low_rank
from .codes import _mix
from .elements import ADDRESS, FIELDS, SCALE, size_of
from .measuring import place_of
from .rules import STEP
from .techniques import (
    FOLDED_COLUMNS,
    FOLDED_ROWS,
    LARGEST_RANK,
    MOMENTUM_FIELDS,
    RANK,
    RATE,
    momentum_number,
    scaled_gradient,
)

# Floats of a momentum's memory beyond its two factors: four by four, and four.
MORE = 20

_LARGEST_CODE, _SMALLEST_NEW_PART = tl.constexpr(low_rank.LARGEST_CODE), tl.constexpr(low_rank.SMALLEST_NEW_PART)
_SMALLEST_NORM = tl.constexpr(low_rank.SMALLEST_NORM)
_STEP = tl.constexpr(STEP)

# Adding and subtracting it rounds a smaller float32 to the nearest whole number, to the even one of two.
_ROUNDS = tl.constexpr(12582912.0)


@triton.jit
def _shape(entry):
    rows, columns = tl.load(entry + FOLDED_ROWS).to(tl.int32), tl.load(entry + FOLDED_COLUMNS).to(tl.int32)
    return rows, columns, tl.load(entry + RANK).to(tl.int32)


@triton.jit
def _codes(entry):
    return tl.load(entry + ADDRESS).to(tl.pointer_type(tl.int8))


@triton.jit
def _scaled_gradients(row, tensor, i, j, rows, columns, total, sums, numbers, maps, RULES: tl.constexpr):
    """A tile of the scaled gradient, as the folded matrix has it; 0 beyond the tensor's end."""
    offsets = i[:, None] * columns + j[None, :]
    mask = (i < rows)[:, None] & (j < columns)[None, :] & (offsets < size_of(row, RULES))
    sg, _ = scaled_gradient(row, tensor, total, sums, numbers, maps, offsets, mask, RULES)
    return tl.where(mask, sg, 0.0)


@triton.jit
def _right_and_probe(entry, j, rows, columns, rank, numbers):
    """Columns of the old right factor, (4, columns), and of the probe, which has a little of every direction."""
    q = tl.arange(0, LARGEST_RANK)[:, None]
    mask = (q < rank) & (j < columns)[None, :]
    right = tl.load(_codes(entry) + q * (rows + columns) + rows + j[None, :], mask, other=0).to(tl.float32)
    count = columns * rank
    shift = tl.load(numbers + _STEP).to(tl.int32, bitcast=True) % count
    element = q * columns + j[None, :] - shift
    element = tl.where(element < 0, element + count, element).to(tl.uint32)
    noise = (_mix(element) & 8191).to(tl.float32) * 0.0001220703125 - 0.5
    return right, tl.where(mask, right + noise, 0.0)


@triton.jit
def _old_left(entry, i, rows, columns, rank, kept):
    """Rows of the old left factor, (rows, 4), times what is kept of it."""
    q = tl.arange(0, LARGEST_RANK)[None, :]
    mask = (i < rows)[:, None] & (q < rank)
    codes = tl.load(_codes(entry) + q * (rows + columns) + i[:, None], mask, other=0).to(tl.float32)
    scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)) + q, q < rank, other=0.0)
    return codes * (scale * kept)


@triton.jit
def look_along_rows(
    table, momenta, work, places, total, sums, numbers, maps, memory, TALL: tl.constexpr, WIDE: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """Of some rows of the updated matrix, its product with the probe: what the new left factor is made of.

    Args:
        table: a row for each tensor.
        momenta: entries of `RULES.momenta` for each tensor.
        work: for each program its entry and which of its rows.
        places: for each entry where its floats are in `memory`.
        total: AGR's sum.
        sums: what is known of each tensor.
        numbers: those of the step.
        maps: the values of the 8-bit maps.
        memory: float32.
    """
    number, part = place_of(work)
    tensor = number // RULES.momenta
    entry = momenta + number * MOMENTUM_FIELDS
    row = table + tensor * FIELDS
    rate = momentum_number(numbers, number % RULES.momenta, RATE)
    rows, columns, rank = _shape(entry)
    i = part * TALL + tl.arange(0, TALL)
    seen = tl.zeros([TALL, LARGEST_RANK], dtype=tl.float32)
    between = tl.zeros([LARGEST_RANK, LARGEST_RANK], dtype=tl.float32)
    for start in range(0, columns, WIDE):
        j = start + tl.arange(0, WIDE)
        matrix = _scaled_gradients(row, tensor, i, j, rows, columns, total, sums, numbers, maps, RULES)
        right, probe = _right_and_probe(entry, j, rows, columns, rank, numbers)
        seen += tl.sum(matrix[:, None, :] * probe[None, :, :], axis=2)
        between += tl.sum(right[:, None, :] * probe[None, :, :], axis=2)
    old = _old_left(entry, i, rows, columns, rank, 1 - rate)
    seen = tl.sum(old[:, :, None] * between[None, :, :], axis=1) + rate * seen
    q = tl.arange(0, LARGEST_RANK)[None, :]
    tl.store(memory + tl.load(places + number) + q * rows + i[:, None], seen, (i < rows)[:, None] & (q < rank))


@triton.jit
def make_left(momenta, work, places, numbers, memory, CHUNK: tl.constexpr, RULES: tl.constexpr):
    """Make the rows of one left factor orthonormal, and write their codes."""
    number, _ = place_of(work)
    entry = momenta + number * MOMENTUM_FIELDS
    rate = momentum_number(numbers, number % RULES.momenta, RATE)
    rows, columns, rank = _shape(entry)
    left = memory + tl.load(places + number)
    for q in range(0, rank):
        least = tl.sqrt_rn(_dot(left + q * rows, left + q * rows, rows, CHUNK)) * _SMALLEST_NEW_PART
        for known in range(0, q):
            dot = _dot(left + known * rows, left + q * rows, rows, CHUNK)
            _subtract(left + q * rows, left + known * rows, dot, rows, CHUNK)
        norm = tl.sqrt_rn(_dot(left + q * rows, left + q * rows, rows, CHUNK))
        # What lies in the span of the rows before is rounding error.
        divisor = tl.where(q == 0, tl.maximum(norm, _SMALLEST_NORM), tl.where(norm > least, norm, float("inf")))
        _divide(left + q * rows, divisor, rows, CHUNK)

    along = tl.zeros([LARGEST_RANK, LARGEST_RANK], dtype=tl.float32)
    q = tl.arange(0, LARGEST_RANK)
    for start in range(0, rows, CHUNK):
        i = start + tl.arange(0, CHUNK)
        new = tl.load(left + q[:, None] * rows + i[None, :], (q < rank)[:, None] & (i < rows)[None, :], other=0.0)
        old = tl.trans(_old_left(entry, i, rows, columns, rank, 1 - rate))
        along += tl.sum(new[:, None, :] * old[None, :, :], axis=2)
    more = left + rank * (rows + columns)
    tl.store(more + q[:, None] * LARGEST_RANK + q[None, :], along)
    tl.debug_barrier()  # All old codes were read.
    _write_codes(_codes(entry), rows + columns, left, more + LARGEST_RANK * LARGEST_RANK, rows, rank, CHUNK)


@triton.jit
def look_along_columns(
    table, momenta, work, places, total, sums, numbers, maps, memory, TALL: tl.constexpr, WIDE: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """Of some columns of the updated matrix, its product with the new left factor; as of `look_along_rows`."""
    number, part = place_of(work)
    tensor = number // RULES.momenta
    entry = momenta + number * MOMENTUM_FIELDS
    row = table + tensor * FIELDS
    rate = momentum_number(numbers, number % RULES.momenta, RATE)
    rows, columns, rank = _shape(entry)
    left = memory + tl.load(places + number)
    j = part * WIDE + tl.arange(0, WIDE)
    q = tl.arange(0, LARGEST_RANK)
    seen = tl.zeros([LARGEST_RANK, WIDE], dtype=tl.float32)
    for start in range(0, rows, TALL):
        i = start + tl.arange(0, TALL)
        matrix = _scaled_gradients(row, tensor, i, j, rows, columns, total, sums, numbers, maps, RULES)
        own = tl.load(left + q[:, None] * rows + i[None, :], (q < rank)[:, None] & (i < rows)[None, :], other=0.0)
        seen += tl.sum(own[:, :, None] * matrix[None, :, :], axis=1)
    more = left + rank * (rows + columns)
    along = tl.load(more + q[:, None] * LARGEST_RANK + q[None, :])
    old, _ = _right_and_probe(entry, j, rows, columns, rank, numbers)
    right = tl.sum(along[:, :, None] * old[None, :, :], axis=1) + rate * seen
    mask = (q < rank)[:, None] & (j < columns)[None, :]
    tl.store(left + rank * rows + q[:, None] * columns + j[None, :], right, mask)


@triton.jit
def make_right(momenta, work, places, memory, CHUNK: tl.constexpr):
    """Write the codes of one right factor, and what a product of codes is worth."""
    number, _ = place_of(work)
    entry = momenta + number * MOMENTUM_FIELDS
    rows, columns, rank = _shape(entry)
    left = memory + tl.load(places + number)
    units = left + rank * (rows + columns) + LARGEST_RANK * LARGEST_RANK
    q = tl.arange(0, LARGEST_RANK)
    units_of_left = tl.load(units + q)
    tl.debug_barrier()
    _write_codes(_codes(entry) + rows, rows + columns, left + rank * rows, units, columns, rank, CHUNK)
    tl.debug_barrier()
    scales = tl.load(entry + SCALE).to(tl.pointer_type(tl.float32))
    tl.store(scales + q, units_of_left * tl.load(units + q), q < rank)


@triton.jit
def _write_codes(codes, stride, factor, units, count, rank, CHUNK: tl.constexpr):
    """Whole numbers from -127 to 127 for each row of a factor, in units of its own, which are written too."""
    for q in range(0, rank):
        largest = tl.zeros([CHUNK], dtype=tl.float32)
        for start in range(0, count, CHUNK):
            i = start + tl.arange(0, CHUNK)
            largest = tl.maximum(largest, tl.abs(tl.load(factor + q * count + i, i < count, other=0.0)))
        unit = tl.math.div_rn(tl.max(largest, axis=0), _LARGEST_CODE * 1.0)
        for start in range(0, count, CHUNK):
            i = start + tl.arange(0, CHUNK)
            x = tl.load(factor + q * count + i, i < count, other=0.0)
            whole = tl.math.div_rn(x, tl.maximum(unit, _SMALLEST_NORM)) + _ROUNDS - _ROUNDS
            tl.store(codes + q * stride + i, whole.to(tl.int32).to(tl.int8), i < count)
        tl.store(units + q, unit)


@triton.jit
def _dot(x, y, count, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], dtype=tl.float32)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(x + i, i < count, other=0.0) * tl.load(y + i, i < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _subtract(x, y, factor, count, CHUNK: tl.constexpr):
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mask = i < count
        tl.store(x + i, tl.load(x + i, mask, other=0.0) - factor * tl.load(y + i, mask, other=0.0), mask)
    tl.debug_barrier()


@triton.jit
def _divide(x, divisor, count, CHUNK: tl.constexpr):
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(x + i, tl.math.div_rn(tl.load(x + i, i < count, other=0.0), divisor), i < count)
    tl.debug_barrier()

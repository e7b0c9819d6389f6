"""Multi-scale momenta in a kernel: what they add to the drive, block by block, and how those of low rank follow.

A momentum m that is due becomes (1 - rate) m + rate sg; the drive is the sum of share * m over all of them. Formats are
those of `storage/full.py`, `storage/nibbles.py` and `storage/low_rank.py`. Of shards the momenta of low rank are only
read here; they follow by `storage/low_rank_shards.py`.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import numpy

from ....storage import low_rank, nibbles
from ..table import FLOAT, FOUR_BITS, LOW_RANK, LOW_RANK_OF_SHARD, MOMENTUM, Located, as_records
from . import loops
from .codes import noise, noise_stream
from .jit import exact, floats, inlined, jit, signed_bytes
from .lanes import LANES, larger, load, smaller, store, sum_of, zeros
from .levels import bytes_as_floats, read_levels, write_levels

_f = numpy.float32

_LARGEST_LEVEL = _f(nibbles.LARGEST)
# Within the last of the places that levels are numbered by, from 0 on.
_LAST_PLACE = _f(2 * nibbles.LARGEST + 0.5)
_BASE = nibbles.BASE
_SPACING = nibbles.SPACING
_SMALLEST_NORM = nibbles.SMALLEST_NORM
_LARGEST_CODE = _f(low_rank.LARGEST_CODE)
_SMALLEST_NEW_PART = _f(low_rank.SMALLEST_NEW_PART)


# A row of a momentum's left factor, the same of its right one, the scale of their product, and which momentum it is of.
FACTOR = numpy.dtype([(name, numpy.int64) for name in ("left", "right", "scale", "momentum")])


_known: WeakKeyDictionary[Located, tuple[numpy.ndarray, numpy.ndarray]] = WeakKeyDictionary()


def records_of(located: Located) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The momenta of some tensors, and the factors of those of low rank; neither is to be written to.

    Returns:
        (tensors, periods) of `table.MOMENTUM`; and (tensors, some) of `FACTOR`, so many for each tensor that fours are
        whole.
    """
    known = _known.get(located)
    if known is None:
        momenta = as_records(located.momenta, MOMENTUM)
        known = _known[located] = momenta, _factors_of(momenta)
    return known


def _factors_of(momenta: numpy.ndarray) -> numpy.ndarray:
    low = (momenta["kind"] == LOW_RANK) | (momenta["kind"] == LOW_RANK_OF_SHARD)
    ranks = numpy.where(low, momenta["rank"], 0)
    most = int(ranks.sum(axis=1).max(initial=0))
    result = numpy.zeros((len(momenta), -(-most // 4) * 4), dtype=FACTOR)
    result["momentum"] = -1
    ends = numpy.cumsum(ranks, axis=1)
    for j in range(momenta.shape[1]):
        own = momenta[:, j]
        for k in range(int(ranks[:, j].max(initial=0))):
            tensors = numpy.flatnonzero(ranks[:, j] > k)
            places = ends[tensors, j] - ranks[tensors, j] + k
            result["left"][tensors, places] = own["address"][tensors] + k * own["left_step"][tensors]
            result["right"][tensors, places] = own["right"][tensors] + k * own["right_step"][tensors]
            result["scale"][tensors, places] = own["scale"][tensors] + 4 * k
            result["momentum"][tensors, places] = j
    return result


# The drive ------------------------------------------------------------------------------------------------------


@jit
def _half_of(start, count, span, high):
    """The part of a block whose levels are the low or the high ones of bytes: its first element, its end, its byte.

    Byte j holds the level of element j and, sixteenfold, that of element j + half, where there is room for `span`.
    """
    half = (span + 1) // 2
    cut = max(0, min(count, half - start))
    return (cut, count, start + cut - half) if high else (0, cut, start)


@jit
def sum_products(momenta, span, rates, raw, start, sums):
    """Add what the norm of each four-bit momentum's new value follows from: raw . m and m . m.

    The value is sg + (1 - rate) / rate * m, and of sg only its multiple `raw` is known yet.
    """
    for j in range(len(momenta)):
        if momenta[j].kind == FOUR_BITS and rates[j] != 0:
            scale = numpy.float64(floats(momenta[j].scale, 0, 1)[0])
            for high in range(2):
                first, end, byte = _half_of(start, len(raw), span, high)
                if first < end:
                    codes = signed_bytes(momenta[j].address, byte, end - first)
                    _sum_levels(codes, raw[first:end], high, scale, sums[2 * j : 2 * j + 2])


@jit
def _sum_levels(codes, raw, high, scale, sums):
    whole = len(raw) // LANES * LANES
    products, squares = zeros(), zeros()
    for i in range(0, whole, LANES):
        levels = read_levels(codes, i, high)
        products = products + load(raw, i) * levels
        squares = squares + levels * levels
    product, square = sum_of(products), sum_of(squares)
    for i in range(whole, len(raw)):
        level = _f(_level_in(codes[i], high))
        product += raw[i] * level
        square += level * level
    sums[0] += scale * product
    sums[1] += scale * scale * square


@jit
def new_spacings(momenta, numel, rates, sums, square, factor, out):
    """The distance between the levels of each momentum's new value, from `sum_products` and raw . raw; in sg's unit.

    `numel` are the elements of a whole tensor, over which everything is summed.
    """
    for j in range(len(momenta)):
        if momenta[j].kind == FOUR_BITS and rates[j] != 0:
            old = (1 - rates[j]) / rates[j]
            norm = factor * factor * square + 2 * factor * old * sums[2 * j] + old * old * sums[2 * j + 1]
            out[j] = max(math.sqrt(max(norm, 0.0)), _SMALLEST_NORM) * _SPACING / math.sqrt(numel)


@inlined
def drive(
    momenta, factors, numel, span, rates, shares, spacings, turning_point, sg, factor, start, write, unpacked, room, out
):  # fmt: skip
    """The weighted mean of the momenta, which drives in place of sg where there is a gradient.

    With `write`, the new momenta are written.

    Args:
        momenta: those of one tensor, `table.MOMENTUM`.
        factors: of those of low rank, `FACTOR`, in fours.
        numel, span: the elements that are here, and that there is room for.
        rates, shares: of each momentum at this step; see `techniques.multiscale.Scale`.
        spacings: from `new_spacings`.
        turning_point: of the rounding to levels.
        sg: the block's scaled gradient, as if its factor were 1.
        factor: its factor.
        start: its first element.
        unpacked: where new levels go, a byte an element of each four-bit momentum, if several threads share the tensor;
            else 0.
        room: memory for a block.
        out: the drive.
    """
    loops.fill(out, _f(0.0))
    # Not the literal 0, for which everything would be compiled once more.
    columns, lead, levels = numpy.int64(0), numpy.int64(0), numpy.int64(unpacked)
    for j in range(len(momenta)):
        if shares[j] == 0:
            continue
        kind = momenta[j].kind
        if kind == FLOAT:
            _add_full(momenta[j], rates[j], shares[j], sg, factor, start, write, room[: len(sg)], out)
        elif kind == FOUR_BITS:
            spacing = _f(spacings[j])
            _add_four_bits(
                momenta[j], span, rates[j], shares[j], spacing, turning_point, sg, factor, start, write, levels, out
            )  # fmt: skip
            if levels != 0 and rates[j] != 0:
                levels += numel
        else:
            columns, lead = momenta[j].folded_columns, momenta[j].lead
    if columns:
        for first in range(0, len(factors), 4):
            _add_four_factors(factors[first : first + 4], shares, columns, lead + start, room, out)


@inlined
def _add_full(momentum, rate, share, sg, factor, start, write, values, out):
    m = floats(momentum.address, start, len(sg))
    loops.copy(m, values)
    loops.scale(values, _f(1.0) - rate)
    loops.add_scaled(sg, rate * factor, values)
    if write and rate != 0:
        loops.copy(values, m)
    loops.add_scaled(values, share, out)


@inlined
def _add_four_bits(
    momentum, span, rate, share, spacing, turning_point, sg, factor, start, write, unpacked, out
):  # fmt: skip
    """out += share * m of a block; with `write`, the new levels are written."""
    scale = floats(momentum.scale, 0, 1)[0]
    offset = _LARGEST_LEVEL + _f(1.0) - turning_point
    for high in range(2):
        first, end, byte = _half_of(start, len(sg), span, high)
        if first >= end:
            continue
        codes = signed_bytes(momentum.address, byte, end - first)
        if rate == 0:
            _add_levels(codes, high, share * scale, out[first:end])
            continue
        kept = (_f(1.0) - rate) / rate * scale
        if write and unpacked == 0:
            inverse = _f(1.0) / spacing
            _update_levels(codes, sg[first:end], factor, high, kept, rate * share, inverse, offset, out[first:end])
            continue
        if write:
            levels = signed_bytes(unpacked, start + first, end - first)
            _quantize(codes, sg[first:end], factor, high, kept, _f(1.0) / spacing, offset, levels)
        _add_moved(codes, sg[first:end], factor, high, kept, rate * share, out[first:end])


@jit
def _add_levels(codes, high, share, out):
    for i in range(len(out)):
        out[i] += share * _f(_level_in(codes[i], high))


@jit
def _add_moved(codes, sg, factor, high, kept, share, out):
    for i in range(len(sg)):
        out[i] += share * (factor * sg[i] + kept * _f(_level_in(codes[i], high)))


@jit
def _update_levels(codes, sg, factor, high, kept, share, unit, offset, out):
    whole = len(sg) // LANES * LANES
    for i in range(0, whole, LANES):
        values = factor * load(sg, i) + kept * read_levels(codes, i, high)
        store(load(out, i) + share * values, out, i)
        write_levels(smaller(larger(values * unit + offset, _f(0.0)), _LAST_PLACE), codes, i, high)
    for i in range(whole, len(sg)):
        value = factor * sg[i] + kept * _f(_level_in(codes[i], high))
        out[i] += share * value
        level, other = _level(value, unit, offset), _level_in(codes[i], not high)
        codes[i] = numpy.int8(other + _BASE * level if high else level + _BASE * other)


@jit
def _quantize(codes, sg, factor, high, kept, unit, offset, levels):
    for i in range(len(sg)):
        levels[i] = numpy.int8(_level(factor * sg[i] + kept * _f(_level_in(codes[i], high)), unit, offset))


@jit
def _level_in(code, high):
    """One of the two levels in a byte."""
    # numba makes the sum of two int32 an int64, in which a loop takes half as many elements at a time.
    of_high = numpy.int32(numpy.int32(numpy.int32(code) + numpy.int32(8)) >> numpy.int32(4))
    return of_high if high else numpy.int32(numpy.int32(code) - numpy.int32(_BASE) * of_high)


@jit
def _level(value, unit, offset):
    """The level of a value: at the turning point between two, rounding turns from down to up."""
    level = min(max(value * unit + offset, _f(0.0)), _LAST_PLACE)
    return numpy.int32(level) - numpy.int32(_LARGEST_LEVEL)


@exact
def pack_levels(unpacked, address, numel, span):
    """Write the levels that several threads left unpacked, where there is room for `span`."""
    half = (span + 1) // 2
    levels, codes = signed_bytes(unpacked, 0, numel), signed_bytes(address, 0, half)
    for i in range(half):
        codes[i] = levels[i] if i < numel else numpy.int8(0)
    for i in range(half, numel):
        codes[i - half] += numpy.int8(_BASE * levels[i])


@jit
def finish_scales(momenta, rates, spacings):
    """Write the new distance between levels, once all blocks are done."""
    for j in range(len(momenta)):
        if momenta[j].kind == FOUR_BITS and rates[j] != 0:
            floats(momenta[j].scale, 0, 1)[0] = _f(spacings[j] * rates[j])


# Low rank -------------------------------------------------------------------------------------------------------


@jit
def _weight(factor, shares):
    """What a factor's product is multiplied by."""
    if factor.momentum < 0:
        return _f(0.0)
    return shares[factor.momentum] * floats(factor.scale, 0, 1)[0]


@jit
def _codes_of(factor, first, address, start, count):
    """Some codes of a factor; of one that is only there to make four, those of the first."""
    return signed_bytes(address if factor.momentum >= 0 else first, start, count)


@inlined
def _add_four_factors(factors, shares, columns, start, room, out):
    """out += the sum of weight * left * right over four factors, of the folded matrix's elements from `start` on."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    if a.momentum < 0:
        return
    v, w = _weight(a, shares), _weight(b, shares)
    x, y = _weight(c, shares), _weight(d, shares)
    count = len(out)
    row, last = start // columns, (start + count - 1) // columns
    many = last - row + 1
    p, q = signed_bytes(a.left, row, many), _codes_of(b, a.left, b.left, row, many)
    r, s = _codes_of(c, a.left, c.left, row, many), _codes_of(d, a.left, d.left, row, many)
    e, f = signed_bytes(a.right, 0, columns), _codes_of(b, a.right, b.right, 0, columns)
    g, h = _codes_of(c, a.right, c.right, 0, columns), _codes_of(d, a.right, d.right, 0, columns)
    column, done = start % columns, 0
    if columns % LANES == 0 and column % LANES == 0 and count % LANES == 0 and 4 * many <= len(room):
        lefts = room[: 4 * many]
        _to_floats(p, v, lefts[:many])
        _to_floats(q, w, lefts[many : 2 * many])
        _to_floats(r, x, lefts[2 * many : 3 * many])
        _to_floats(s, y, lefts[3 * many :])
        _add_columns(e.ctypes.data, f.ctypes.data, g.ctypes.data, h.ctypes.data, columns, column, lefts, out)
        return
    for i in range(many):
        length = min(columns - column, count - done)
        _add_row(
            e[column : column + length], f[column : column + length], g[column : column + length],
            h[column : column + length], v * _f(p[i]), w * _f(q[i]), x * _f(r[i]), y * _f(s[i]),
            out[done : done + length],
        )  # fmt: skip
        done += length
        column = 0


@jit
def _add_columns(e, f, g, h, columns, column, lefts, out):
    """out += the products, whose left factors are there as floats and whose right ones are at these addresses.

    Sixteen columns at a time go down all rows. The first element of `out` is of a column.
    """
    many = len(lefts) // 4
    for first in range(0, columns, LANES):
        a, b, c, d = (
            bytes_as_floats(e + first),
            bytes_as_floats(f + first),
            bytes_as_floats(g + first),
            bytes_as_floats(h + first),
        )
        row = 0 if first >= column else 1
        for place in range(first - column + row * columns, len(out), columns):
            total = load(out, place) + a * lefts[row] + b * lefts[many + row]
            store(total + c * lefts[2 * many + row] + d * lefts[3 * many + row], out, place)
            row += 1


@jit
def _add_row(e, f, g, h, v, w, x, y, out):
    for i in range(len(out)):
        out[i] += v * _f(e[i]) + w * _f(f[i]) + x * _f(g[i]) + y * _f(h[i])


@exact
def _to_floats(codes, unit, out):
    for i in range(len(codes)):
        out[i] = unit * _f(codes[i])


@inlined
def begin_low_rank(momentum, rate, step):
    """What an iteration of one momentum needs before it sees the gradient.

    Returns:
        The old factors (rank, rows + columns), the left one times the share that is kept; the probe (rank, columns);
        and what the old product makes of it (rank, rows).
    """
    rows, columns, rank = momentum.folded_rows, momentum.folded_columns, momentum.rank
    length = rows + columns
    scales = floats(momentum.scale, 0, rank)
    factors = numpy.empty((rank, length), dtype=numpy.float32)
    probe = numpy.empty((rank, columns), dtype=numpy.float32)
    seen = numpy.zeros((rank, rows), dtype=numpy.float32)
    stream = noise_stream(0, 0)
    for k in range(rank):
        _to_floats(signed_bytes(momentum.address, k * length, length), _f(1.0), factors[k])
        for c in range(columns):
            # Without a little of every direction, one that the factors lack could never come in.
            place = (k * columns + c - step) % (rank * columns)
            probe[k, c] = factors[k, rows + c] + (noise(stream, place) - _f(0.5))
        loops.scale(factors[k, :rows], scales[k] * (_f(1.0) - rate))
    for k in range(rank):
        for other in range(rank):
            loops.add_scaled(factors[other, :rows], loops.dot(factors[other, rows:], probe[k]), seen[k])
    return factors, probe, seen


@inlined
def probe_gradient(momentum, rate, sg, start, probe, seen):
    """seen += rate * (the gradient's block) probe^T."""
    columns = momentum.folded_columns
    done = 0
    while done < len(sg):
        row, column = (start + done) // columns, (start + done) % columns
        many = min(columns - column, len(sg) - done)
        for k in range(len(probe)):
            product = loops.dot(sg[done : done + many], probe[k, column : column + many])
            seen[k, row] += rate * product
        done += many


@inlined
def begin_right(momentum, factors, left):
    """Make `left` orthonormal; returns the right factor that it has with the old product."""
    rows, rank = momentum.folded_rows, momentum.rank
    _orthonormalize(left)
    right = numpy.zeros((rank, momentum.folded_columns), dtype=numpy.float32)
    for k in range(rank):
        for other in range(rank):
            loops.add_scaled(factors[other, rows:], loops.dot(left[k], factors[other, :rows]), right[k])
    return right


@inlined
def project_gradient(momentum, rate, sg, start, left, right):
    """right += rate * left (the gradient's block)."""
    columns = momentum.folded_columns
    done = 0
    while done < len(sg):
        row, column = (start + done) // columns, (start + done) % columns
        many = min(columns - column, len(sg) - done)
        for k in range(len(left)):
            part = sg[done : done + many]
            loops.add_scaled(part, rate * left[k, row], right[k, column : column + many])
        done += many


@inlined
def finish_low_rank(momentum, left, right):
    """Write the new factors down."""
    rows, columns, rank = momentum.folded_rows, momentum.folded_columns, momentum.rank
    scales = floats(momentum.scale, 0, rank)
    for k in range(rank):
        codes = signed_bytes(momentum.address, k * (rows + columns), rows + columns)
        scales[k] = _code_factor(left[k], codes[:rows]) * _code_factor(right[k], codes[rows:])


@exact
def _code_factor(factor, codes):
    largest = _f(0.0)
    for i in range(len(factor)):
        largest = max(largest, abs(factor[i]))
    step = largest / _LARGEST_CODE
    divisor = max(step, _f(_SMALLEST_NORM))
    for i in range(len(factor)):
        codes[i] = numpy.int8(numpy.rint(factor[i] / divisor))
    return step


@inlined
def _orthonormalize(x):
    """As `storage.low_rank`: rows that lie in the span of the rows before them become 0."""
    for k in range(len(x)):
        least = _f(math.sqrt(loops.sum_of_squares(x[k]))) * _SMALLEST_NEW_PART
        for known in range(k):
            loops.add_scaled(x[known], -loops.dot(x[known], x[k]), x[k])
        norm = _f(math.sqrt(loops.sum_of_squares(x[k])))
        is_new = k == 0 or norm > least
        loops.scale(x[k], _f(1.0) / max(norm, _f(_SMALLEST_NORM)) if is_new else _f(0.0))

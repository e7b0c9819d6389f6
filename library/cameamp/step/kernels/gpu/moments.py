"""What the rules need to know of each tensor as a whole, before anything is written.

As in `measuring.py`, programs sum up spans, and a kernel of its own adds them up in their order. The sums of the early
phase are float64: the part of an update across the weights is a difference of squares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....storage import nibbles
from ....techniques import orthograd, tam
from . import rules
from .codes import FOUR_BITS, SIGNED, load_levels, load_state
from .elements import (
    ADDRESS,
    COLUMNS,
    FIELDS,
    KIND,
    ROWS,
    SCALE,
    WHOLE_NUMEL,
    elements_of,
    room_of,
    size_of,
    weights,
)
from .measuring import place_of
from .techniques import (
    ACROSS,
    AGREEMENT,
    ALONG,
    CLIP,
    EXP_AVG,
    KEPT,
    MOMENTUM_FIELDS,
    RATE,
    across_weights,
    drive_of,
    momentum_number,
    regularized,
    remembered,
    scaled_gradient,
    sums_a_tensor,
    unclipped,
    update_of,
)

_CLIP_THRESHOLD, _EPS3 = tl.constexpr(rules.CLIP_THRESHOLD), tl.constexpr(rules.EPS3)
_ROW_FLOOR = tl.constexpr(rules.ROW_FLOOR)
_SMALLEST_COLUMN_NORM = tl.constexpr(tam.SMALLEST_NORM)
_SMALLEST_WEIGHT_SQUARE = tl.constexpr(orthograd.SMALLEST_NORM**2)
_SMALLEST_LEVEL_NORM = tl.constexpr(nibbles.SMALLEST_NORM)


# CAME's bound, and the norms that four bits are scaled by --------------------------------------------------------


@triton.jit
def sum_squares(
    table, momenta, work, firsts, total, numbers, maps, partials, SPAN: tl.constexpr, RULES: tl.constexpr
):  # fmt: skip
    """Of one span of x = grad / sqrt(v): sum x^2, and for each momentum m of four bits sum x m and sum m^2.

    Args:
        table: a row for each tensor.
        momenta: entries of `RULES.momenta` for each tensor.
        work: for each program its tensor and its span.
        firsts: for each tensor the number of its first span.
        total: AGR's sum.
        numbers: those of the step.
        maps: the values of the 8-bit maps.
        partials: (spans, 1 + 2 momenta) float32, to be filled.
    """
    tensor, span = place_of(work)
    row = table + tensor * FIELDS
    offsets, mask = elements_of(row, span, SPAN, RULES)
    grad = regularized(row, total, offsets, mask, RULES)
    x, _ = unclipped(row, grad, numbers, maps, offsets, mask, RULES)
    found = partials + (tl.load(firsts + tensor) + span) * (1 + 2 * RULES.momenta)
    tl.store(found, tl.sum(x * x, axis=0))
    for place in range(0, RULES.momenta):
        entry = momenta + (tensor * RULES.momenta + place) * MOMENTUM_FIELDS
        if (tl.load(entry + KIND) == FOUR_BITS) & (momentum_number(numbers, place, RATE) > 0):
            levels = load_levels(tl.load(entry + ADDRESS), room_of(row, RULES), offsets, mask)
            scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
            tl.store(found + 1 + 2 * place, tl.sum(x * levels, axis=0) * scale)
            tl.store(found + 2 + 2 * place, tl.sum(levels * levels, axis=0) * scale * scale)


@triton.jit
def clip_tensor(table, momenta, work, firsts, numbers, partials, sums, CHUNK: tl.constexpr, RULES: tl.constexpr):
    """CAME: 1 / max(1, RMS(x) / threshold) of one tensor; and |sg + (1 - rate) / rate m| of each momentum m."""
    tensor, _ = place_of(work)
    row = table + tensor * FIELDS
    width: tl.constexpr = 1 + 2 * RULES.momenta
    first, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    squares = _sum_up(partials, first, end, width, CHUNK)
    clip = tl.full([], 1.0, tl.float64)
    if RULES.came:
        root = tl.sqrt(squares / tl.load(row + WHOLE_NUMEL).to(tl.float64))
        clip = 1.0 / tl.maximum(root / tl.load(numbers + _CLIP_THRESHOLD), 1.0)
    tl.store(sums + tensor * sums_a_tensor(RULES) + CLIP, clip.to(tl.float32))
    for place in range(0, RULES.momenta):
        entry = momenta + (tensor * RULES.momenta + place) * MOMENTUM_FIELDS
        if (tl.load(entry + KIND) == FOUR_BITS) & (momentum_number(numbers, place, RATE) > 0):
            kept = momentum_number(numbers, place, KEPT).to(tl.float64)
            mixed = _sum_up(partials + 1 + 2 * place, first, end, width, CHUNK)
            old = _sum_up(partials + 2 + 2 * place, first, end, width, CHUNK)
            square = clip * clip * squares + 2.0 * clip * kept * mixed + kept * kept * old
            norm = tl.sqrt(tl.maximum(square, 0.0)).to(tl.float32)
            tl.store(sums + tensor * sums_a_tensor(RULES) + 4 + place, tl.maximum(norm, _SMALLEST_LEVEL_NORM))


@triton.jit
def _sum_up(partials, first, end, width: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of every width-th number, of those from `first` to before `end`, in float64."""
    total = tl.zeros([CHUNK], dtype=tl.float64)
    for start in range(first, end, CHUNK):
        spans = start + tl.arange(0, CHUNK)
        total += tl.load(partials + spans * width, spans < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def add_up(work, firsts, partials, totals, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """What one tensor's partial sums come to, WIDTH numbers each, in float64: what a process tells the others."""
    tensor, _ = place_of(work)
    first, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    for number in range(0, WIDTH):
        tl.store(totals + tensor * WIDTH + number, _sum_up(partials + number, first, end, WIDTH, CHUNK))


@triton.jit
def show_scaled(table, work, first, total, numbers, maps, shown, SPAN: tl.constexpr, RULES: tl.constexpr):
    """One span of x = grad / sqrt(v).

    Args:
        first: the number of the first tensor in `shown`.
        shown: the tensors of a stack, float32, to be filled.

    The others are as of `sum_squares`.
    """
    tensor, span = place_of(work)
    row = table + tensor * FIELDS
    offsets, mask = elements_of(row, span, SPAN, RULES)
    x, _ = unclipped(row, regularized(row, total, offsets, mask, RULES), numbers, maps, offsets, mask, RULES)
    tl.store(shown + (tensor - first).to(tl.int64) * size_of(row, RULES) + offsets, x, mask)


# Column norms ---------------------------------------------------------------------------------------------------


@triton.jit
def sum_columns(
    table, momenta, work, firsts, total, sums, numbers, maps, partials, TALL: tl.constexpr, WIDE: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """Of one tile, TALL rows by WIDE columns: the sums of squares of each column, of momentum and drive.

    Args:
        partials: (tiles, 2, WIDE) float32, to be filled.

    The others are as of `sum_squares`, with tiles in place of spans.
    """
    tensor, tile = place_of(work)
    row = table + tensor * FIELDS
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    tiles_a_row = (columns + WIDE - 1) // WIDE
    i = (tile // tiles_a_row) * TALL + tl.arange(0, TALL)
    j = (tile % tiles_a_row) * WIDE + tl.arange(0, WIDE)
    offsets = i[:, None] * columns + j[None, :]
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    entries = momenta + tensor * RULES.momenta * MOMENTUM_FIELDS
    mean, share = remembered(row, entries, numbers, offsets, mask, RULES)
    sg, _ = scaled_gradient(row, tensor, total, sums, numbers, maps, offsets, mask, RULES)
    drive = tl.where(mask, drive_of(mean, share, sg, RULES), 0.0)
    exp_avg = tl.where(mask, load_state(row, EXP_AVG, SIGNED, maps, offsets, mask, RULES), 0.0)
    found = partials + (tl.load(firsts + tensor) + tile) * (2 * WIDE) + tl.arange(0, WIDE)
    tl.store(found, tl.sum(exp_avg * exp_avg, axis=0))
    tl.store(found + WIDE, tl.sum(drive * drive, axis=0))


@triton.jit
def finish_columns(
    table, work, firsts, places, partials, norms, squares, TALL: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Of some columns the product of both norms; or, if not WHOLE, the sum of squares of the momentum and of the drive.

    Args:
        work: for each program its tensor and which of its columns.
        places: for each tensor where its first column is in `norms`.
        norms: (columns of all tensors,) float32, to be filled: with the products, or the squares of the momentum.
        squares: the same for those of the drive.
    """
    tensor, part = place_of(work)
    row = table + tensor * FIELDS
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    tiles_a_row = (columns + WIDE - 1) // WIDE
    first = tl.load(firsts + tensor) + part
    momentum = tl.zeros([WIDE], dtype=tl.float32)
    drive = tl.zeros([WIDE], dtype=tl.float32)
    for tile in range(0, (rows + TALL - 1) // TALL):
        found = partials + (first + tile * tiles_a_row) * (2 * WIDE) + tl.arange(0, WIDE)
        momentum += tl.load(found)
        drive += tl.load(found + WIDE)
    j = part * WIDE + tl.arange(0, WIDE)
    place = tl.load(places + tensor) + j
    if WHOLE:
        tl.store(norms + place, _floored_root(momentum) * _floored_root(drive), j < columns)
    else:
        tl.store(norms + place, momentum, j < columns)
        tl.store(squares + place, drive, j < columns)


@triton.jit
def _floored_root(squares):
    return tl.maximum(tl.sqrt_rn(squares), _SMALLEST_COLUMN_NORM)


# The orthogonal gradient, and Cautious ---------------------------------------------------------------------------


@triton.jit
def sum_products(
    table, momenta, work, firsts, places, norms, total, sums, numbers, maps, partials, SPAN: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """Of one span: u.p, u.u and p.p of the update and the weights.

    Args:
        places: for each tensor where its first column is in `norms`.
        norms: the products of the columns' norms.
        partials: (spans, 3) float64, to be filled.

    The others are as of `sum_squares`.
    """
    tensor, span = place_of(work)
    row = table + tensor * FIELDS
    offsets, mask = elements_of(row, span, SPAN, RULES)
    entries = momenta + tensor * RULES.momenta * MOMENTUM_FIELDS
    own_norms = norms + tl.load(places + tensor)
    u, _ = update_of(
        row, tensor, entries, own_norms, total, sums, numbers, maps, offsets, mask, RULES
    )  # fmt: skip
    u, p = u.to(tl.float64), weights(row, offsets, mask, RULES).to(tl.float64)
    found = partials + (tl.load(firsts + tensor) + span) * 3
    tl.store(found, tl.sum(u * p, axis=0))
    tl.store(found + 1, tl.sum(u * u, axis=0))
    tl.store(found + 2, tl.sum(p * p, axis=0))


@triton.jit
def orthogonal_tensor(table, work, firsts, numbers, partials, sums, CHUNK: tl.constexpr, RULES: tl.constexpr):
    """OrthoGrad: (u.p) / (p.p) of one tensor, and |u| / |v| for v = u - p (u.p) / (p.p)."""
    tensor, _ = place_of(work)
    first, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    both = _sum_up(partials, first, end, 3, CHUNK)
    u_square = _sum_up(partials + 1, first, end, 3, CHUNK)
    p_square = _sum_up(partials + 2, first, end, 3, CHUNK)
    has_direction = (p_square > _SMALLEST_WEIGHT_SQUARE) & (tl.load(table + tensor * FIELDS + WHOLE_NUMEL) > 1)
    along = both / tl.where(has_direction, p_square, 1.0)
    left = tl.sqrt(tl.maximum(u_square - both * along, 0.0))
    factor = tl.sqrt(u_square) / tl.maximum(left, tl.load(numbers + _EPS3).to(tl.float64))
    found = sums + tensor * sums_a_tensor(RULES)
    tl.store(found + ALONG, tl.where(has_direction, along, 0.0).to(tl.float32))
    tl.store(found + ACROSS, tl.where(has_direction, factor, 1.0).to(tl.float32))


@triton.jit
def count_agreement(
    table, momenta, work, firsts, places, norms, total, sums, numbers, maps, partials, SPAN: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """Cautious: of one span, how many elements of the update have the gradient's sign; as of `sum_products`.

    Args:
        partials: (spans,) float32, to be filled.
    """
    tensor, span = place_of(work)
    row = table + tensor * FIELDS
    offsets, mask = elements_of(row, span, SPAN, RULES)
    entries = momenta + tensor * RULES.momenta * MOMENTUM_FIELDS
    own_norms = norms + tl.load(places + tensor)
    u, direction = update_of(
        row, tensor, entries, own_norms, total, sums, numbers, maps, offsets, mask, RULES
    )  # fmt: skip
    if RULES.early:
        u = across_weights(u, weights(row, offsets, mask, RULES), tensor, sums, RULES)
    agrees = mask & (u * direction > 0)
    tl.store(partials + tl.load(firsts + tensor) + span, tl.sum(agrees.to(tl.float32), axis=0))


@triton.jit
def agreement_of_tensor(table, work, firsts, partials, sums, CHUNK: tl.constexpr, RULES: tl.constexpr):
    """Cautious: n / (sum of agreement + 1) of one tensor of n elements."""
    tensor, _ = place_of(work)
    count = _sum_up(partials, tl.load(firsts + tensor), tl.load(firsts + tensor + 1), 1, CHUNK)
    numel = tl.load(table + tensor * FIELDS + WHOLE_NUMEL)
    tl.store(sums + tensor * sums_a_tensor(RULES) + AGREEMENT, (numel / (count + 1.0)).to(tl.float32))


# ALLoRA ---------------------------------------------------------------------------------------------------------


@triton.jit
def scale_rows(
    table, work, places, numbers, factors, TALL: tl.constexpr, WIDE: tl.constexpr, RULES: tl.constexpr
):  # fmt: skip
    """Of TALL rows of one tensor: 1 / sqrt(|p_i| + 1 / eta^2).

    Args:
        work: for each program its tensor and which of its rows.
        places: for each tensor where its first row is in `factors`.
        factors: (rows of all tensors,) float32, to be filled.
    """
    tensor, part = place_of(work)
    row = table + tensor * FIELDS
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    i = part * TALL + tl.arange(0, TALL)
    squares = tl.zeros([TALL, WIDE], dtype=tl.float32)
    for start in range(0, columns, WIDE):
        j = start + tl.arange(0, WIDE)
        p = weights(row, i[:, None] * columns + j[None, :], (i < rows)[:, None] & (j < columns)[None, :], RULES)
        squares += p * p
    norm = tl.sqrt_rn(tl.sum(squares, axis=1))
    tl.store(factors + tl.load(places + tensor) + i, tl.rsqrt(norm + tl.load(numbers + _ROW_FLOOR)), i < rows)

"""The last pass: every state and every weight is written, and nobody reads the old ones any more."""

from __future__ import annotations

import triton
import triton.language as tl

from ....storage import nibbles
from .. import table as fields
from . import rules
from .codes import (
    EVEN,
    ROOT,
    SIGNED,
    high_level,
    low_level,
    noise,
    stochastic_round,
    store_state,
    store_truths,
)
from .elements import (
    ADDRESS,
    COLUMNS,
    FIELDS,
    FLOAT,
    KIND,
    SCALE,
    STATES,
    WEIGHT,
    WHOLE_NUMEL,
    elements_of,
    room_of,
    seen_by_context,
    size_of,
    store_floats,
    weights,
)
from .measuring import place_of
from .techniques import (
    AGREEMENT,
    EXP_AVG,
    EXP_AVG_RES,
    EXP_AVG_SQ,
    KEPT,
    LAST_POLARITY,
    LR_MASK,
    MOMENTUM_FIELDS,
    RATE,
    TURN,
    S,
    across_weights,
    bumped_mask,
    divided_by_belief,
    drive_of,
    momentum_number,
    new_momentum,
    regularized,
    remembered,
    scaled_gradient,
    sign,
    tensor_sum,
    turned_to_gradient,
)

_SCHEDULER, _WEIGHT_DECAY = tl.constexpr(rules.SCHEDULER), tl.constexpr(rules.WEIGHT_DECAY)
_FLOAT32 = tl.constexpr(fields.FLOAT32)
_LARGEST_LEVEL, _BASE = tl.constexpr(nibbles.LARGEST), tl.constexpr(nibbles.BASE)
_SPACING = tl.constexpr(nibbles.SPACING)


@triton.jit(do_not_specialize=["every"])
def write_step(
    table, momenta, work, places, norms, row_places, row_factors, total, strengths, multiplier, sums, numbers, maps,
    firsts, sample, changes, every, SPAN: tl.constexpr, RULES: tl.constexpr,
):  # fmt: skip
    """One span through all rules.

    Args:
        table: a row for each tensor.
        momenta: entries of `RULES.momenta` for each tensor.
        work: for each program its tensor and its span.
        places: for each tensor where its first column is in `norms`.
        norms: the products of the columns' norms.
        row_places: for each tensor where its first row is in `row_factors`.
        row_factors: ALLoRA's factors.
        total: AGR's sum.
        strengths: theta of each tensor.
        multiplier: the context's.
        sums: what is known of each tensor.
        numbers: those of the step.
        maps, firsts: the tables of 8-bit codes.
        sample, changes: what the context sees of sg and of the step, every `every`-th element; to be filled.
    """
    tensor, span = place_of(work)
    row = table + tensor * FIELDS
    offsets, mask = elements_of(row, span, SPAN, RULES)
    entries = momenta + tensor * RULES.momenta * MOMENTUM_FIELDS
    own_norms = norms + tl.load(places + tensor)
    # Each state is written as soon as it is known: fewer of them have to be in registers at a time.
    mean, share = remembered(row, entries, numbers, offsets, mask, RULES)
    sg, v = scaled_gradient(row, tensor, total, sums, numbers, maps, offsets, mask, RULES)
    if RULES.came:
        store_state(row, EXP_AVG_SQ, ROOT, numbers, maps, firsts, offsets, mask, v, SPAN, RULES)
    drive = drive_of(mean, share, sg, RULES)
    exp_avg, residual, s = new_momentum(row, own_norms, sg, drive, numbers, maps, offsets, mask, RULES)
    if RULES.early:
        store_state(row, S, SIGNED, numbers, maps, firsts, offsets, mask, s, SPAN, RULES)
    u, r = divided_by_belief(row, exp_avg, residual, numbers, maps, offsets, mask, RULES)
    store_state(row, EXP_AVG, SIGNED, numbers, maps, firsts, offsets, mask, exp_avg, SPAN, RULES)
    store_state(row, EXP_AVG_RES, ROOT, numbers, maps, firsts, offsets, mask, r, SPAN, RULES)
    direction = sign(sg)
    u = turned_to_gradient(u, direction, numbers)
    for place in range(0, RULES.momenta):
        _write_momentum(entries + place * MOMENTUM_FIELDS, place, sg, numbers, offsets, mask)

    p = weights(row, offsets, mask, RULES)
    if RULES.early:
        u = across_weights(u, p, tensor, sums, RULES)
    rates = bumped_mask(row, direction, numbers, maps, offsets, mask, RULES)
    if RULES.bumps:
        store_state(row, LR_MASK, EVEN, numbers, maps, firsts, offsets, mask, rates, SPAN, RULES)
    if RULES.warmup:
        store_truths(row, LAST_POLARITY, offsets, mask, (direction > 0).to(tl.int32))
    if RULES.cautious:
        u = tl.where(u * direction > 0, u, 0.0) * tensor_sum(sums, tensor, AGREEMENT, RULES)
    if RULES.decays and RULES.early:
        u += tl.load(numbers + _WEIGHT_DECAY) * tl.load(strengths + tensor) * p
    if RULES.scaled:
        rates *= tl.load(multiplier)
    u *= tl.load(numbers + _SCHEDULER)
    if RULES.row_scaled:
        rows = offsets // tl.load(row + COLUMNS).to(tl.int32)
        u *= tl.load(row_factors + tl.load(row_places + tensor) + rows, mask, other=0.0)
    change = rates * u
    p -= change
    if RULES.weights != _FLOAT32:
        p = stochastic_round(p, noise(row, numbers, offsets, RULES), RULES.weights)
    store_floats(tl.load(row + WEIGHT), offsets, mask, p, RULES.weights, RULES)
    if RULES.watched:
        place, seen = seen_by_context(row, offsets, mask, every, RULES)
        tl.store(sample + place, sg, seen)
        tl.store(changes + place, change, seen)


@triton.jit
def _write_momentum(entry, place, sg, numbers, offsets, mask):
    """A momentum that is written in full, with this step in it if it is due; the others have kernels of their own."""
    rate = momentum_number(numbers, place, RATE)
    if (tl.load(entry + KIND) == FLOAT) & (rate > 0):
        pointer = tl.load(entry + ADDRESS).to(tl.pointer_type(tl.float32)) + offsets
        old = tl.load(pointer, mask, other=0.0)
        tl.store(pointer, old + rate * (sg - old), mask)


@triton.jit
def pack_signs(table, work, total, SPAN: tl.constexpr, RULES: tl.constexpr):
    """Where the signs of gradients have a bit each: byte j gets those of the elements j, j + k, ..., j + 7 k."""
    tensor, part = place_of(work)
    row = table + tensor * FIELDS
    entry = row + STATES + 3 * LAST_POLARITY
    numel, count = size_of(row, RULES), (room_of(row, RULES) + 7) // 8
    j = part * SPAN + tl.arange(0, SPAN)
    mask = j < count
    byte = tl.zeros([SPAN], dtype=tl.int32)
    for place in tl.static_range(8):
        element = place * count + j
        byte |= (regularized(row, total, element, mask & (element < numel), RULES) > 0).to(tl.int32) << place
    tl.store(tl.load(entry + ADDRESS).to(tl.pointer_type(tl.uint8)) + j, byte.to(tl.uint8), mask)


@triton.jit
def pack_levels(
    table, momenta, work, places, total, sums, numbers, maps, packed, SPAN: tl.constexpr, PLACE: tl.constexpr,
    RULES: tl.constexpr,
):  # fmt: skip
    """One momentum of four bits with this step in it: bytes of two elements, which lie half a tensor apart.

    The levels go to a memory of their own, because the rules still have to read the old ones.

    Args:
        work: for each program its tensor and which of its bytes.
        places: for each tensor where its first byte is in `packed`.
        packed: int8, to be filled.
        PLACE: which momentum.
    """
    tensor, part = place_of(work)
    row = table + tensor * FIELDS
    entry = momenta + (tensor * RULES.momenta + PLACE) * MOMENTUM_FIELDS
    numel, half = size_of(row, RULES), (room_of(row, RULES) + 1) // 2
    j = part * SPAN + tl.arange(0, SPAN)
    mask = j < half
    byte = tl.load(tl.load(entry + ADDRESS).to(tl.pointer_type(tl.int8)) + j, mask, other=0).to(tl.int32)
    scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
    kept = momentum_number(numbers, PLACE, KEPT) * scale
    norm = tl.load(sums + tensor * (4 + RULES.momenta) + 4 + PLACE)
    per_level = 1 / (_spacing(row) * norm)
    turn = momentum_number(numbers, PLACE, TURN)
    lower = mask & (j < numel)
    sg, _ = scaled_gradient(row, tensor, total, sums, numbers, maps, j, lower, RULES)
    low = _level(sg + kept * low_level(byte).to(tl.float32), per_level, turn)
    low = tl.where(lower, low, 0)
    upper = mask & (half + j < numel)
    sg, _ = scaled_gradient(row, tensor, total, sums, numbers, maps, half + j, upper, RULES)
    high = _level(sg + kept * high_level(byte).to(tl.float32), per_level, turn)
    high = tl.where(upper, high, 0)
    tl.store(packed + tl.load(places + tensor) + j, (low + high * _BASE).to(tl.int8), mask)


@triton.jit
def _spacing(row):
    """The distance between levels, in norms of the whole tensor."""
    return tl.math.div_rn(1.0, tl.sqrt_rn(tl.load(row + WHOLE_NUMEL).to(tl.float32))) * _SPACING


@triton.jit
def _level(x, per_level, turn):
    """The level of a value, rounded up from the turning point on."""
    places = tl.minimum(tl.maximum(x * per_level + turn, 0.0), 2 * _LARGEST_LEVEL + 0.5)
    return places.to(tl.int32) - _LARGEST_LEVEL


@triton.jit
def keep_levels(
    table, momenta, work, places, sums, numbers, packed, SPAN: tl.constexpr, PLACE: tl.constexpr, RULES: tl.constexpr
):  # fmt: skip
    """Put the levels of `pack_levels` where they belong, and their scale beside them."""
    tensor, part = place_of(work)
    row = table + tensor * FIELDS
    entry = momenta + (tensor * RULES.momenta + PLACE) * MOMENTUM_FIELDS
    j = part * SPAN + tl.arange(0, SPAN)
    mask = j < (room_of(row, RULES) + 1) // 2
    codes = tl.load(packed + tl.load(places + tensor) + j, mask, other=0)
    tl.store(tl.load(entry + ADDRESS).to(tl.pointer_type(tl.int8)) + j, codes, mask)
    norm = tl.load(sums + tensor * (4 + RULES.momenta) + 4 + PLACE)
    scale = norm * _spacing(row) * momentum_number(numbers, PLACE, RATE)
    tl.store(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)), scale, part == 0)

"""The techniques on elements of one tensor, in registers: the formulas of the files of the same names.

A pass that needs what an earlier rule made of an element computes it anew, from the gradient and the states as they
were before the step: memory is what a step waits for, and that way only the last pass writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....states import TABLE
from ....techniques import adabelief, tam
from .. import table as fields
from . import rules
from .codes import EVEN, LOW_RANK, LOW_RANK_OF_SHARD, ROOT, SIGNED, load_levels, load_state, load_truths
from .elements import ADDRESS, COLUMNS, FLOAT, KIND, SCALE, room_of, usable_gradient

_NUMBERS = {state.name: number for number, state in enumerate(TABLE)}
LR_MASK, EXP_AVG = tl.constexpr(_NUMBERS["lr_mask"]), tl.constexpr(_NUMBERS["exp_avg"])
EXP_AVG_RES, EXP_AVG_SQ = tl.constexpr(_NUMBERS["exp_avg_res"]), tl.constexpr(_NUMBERS["exp_avg_sq"])
S, LAST_POLARITY = tl.constexpr(_NUMBERS["s"]), tl.constexpr(_NUMBERS["last_polarity"])

_SECOND_RATE, _EPS1 = tl.constexpr(rules.SECOND_RATE), tl.constexpr(rules.EPS1)
_CLIP_BOUND, _MOMENTUM_RATE = tl.constexpr(rules.CLIP_BOUND), tl.constexpr(rules.MOMENTUM_RATE)
_BETA1, _RESIDUAL_RATE = tl.constexpr(rules.BETA1), tl.constexpr(rules.RESIDUAL_RATE)
_EPS2, _CORRECTION, _SHARE = tl.constexpr(rules.EPS2), tl.constexpr(rules.CORRECTION), tl.constexpr(rules.SHARE)
_BUMP, _MIN_LR, _MAX_LR = tl.constexpr(rules.BUMP), tl.constexpr(rules.MIN_LR), tl.constexpr(rules.MAX_LR)
_MOMENTA, _MOMENTUM_NUMBERS = tl.constexpr(rules.MOMENTA), tl.constexpr(rules.MOMENTUM_NUMBERS)
RATE, MEAN_SHARE, KEPT = tl.constexpr(rules.RATE), tl.constexpr(rules.MEAN_SHARE), tl.constexpr(rules.KEPT)
TURN = tl.constexpr(rules.TURN)

MOMENTUM_FIELDS = tl.constexpr(fields.MOMENTUM_FIELDS)
FOLDED_ROWS, FOLDED_COLUMNS = tl.constexpr(fields.FOLDED_ROWS), tl.constexpr(fields.FOLDED_COLUMNS)
RANK, RIGHT = tl.constexpr(fields.RANK), tl.constexpr(fields.RIGHT)
LEFT_STEP, RIGHT_STEP = tl.constexpr(fields.LEFT_STEP), tl.constexpr(fields.RIGHT_STEP)
LEAD = tl.constexpr(fields.LEAD)
LARGEST_RANK = tl.constexpr(4)

# What is known of each tensor as a whole, in this order.
CLIP, ALONG, ACROSS, AGREEMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_TORQUE = tl.constexpr(1 - tam.DECAY)
_TORQUE_DECAY = tl.constexpr(tam.DECAY)
_LONGEST = tl.constexpr(adabelief.LONGEST)


# Numbers --------------------------------------------------------------------------------------------------------


@triton.jit
def momentum_number(numbers, place, NUMBER: tl.constexpr):
    """A number of one of the multi-scale momenta."""
    return tl.load(numbers + _MOMENTA + _MOMENTUM_NUMBERS * place + NUMBER)


@triton.jit
def tensor_sum(sums, tensor, NUMBER: tl.constexpr, RULES: tl.constexpr):
    """What an earlier pass has found of a whole tensor."""
    return tl.load(sums + tensor * sums_a_tensor(RULES) + NUMBER)


@triton.jit
def sums_a_tensor(RULES: tl.constexpr):
    """How many numbers `sums` has of each tensor: four, and the root of the sum of squares of each momentum."""
    return 4 + RULES.momenta


# AGR and CAME ---------------------------------------------------------------------------------------------------


@triton.jit
def regularized(row, total, offsets, mask, RULES: tl.constexpr):
    """AGR: grad = g (1 - |g| / S)."""
    g = usable_gradient(row, offsets, mask, RULES)
    return g - g * (tl.abs(g) / tl.load(total))


@triton.jit
def second_moment(row, grad, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """CAME: v = b2 v + (1 - b2) (grad^2 + eps1)."""
    v = load_state(row, EXP_AVG_SQ, ROOT, maps, offsets, mask, RULES)
    rate, eps = tl.load(numbers + _SECOND_RATE), tl.load(numbers + _EPS1)
    return v + rate * (eps - v) + rate * grad * grad


@triton.jit
def unclipped(row, grad, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """CAME before its bound, grad / sqrt(v); without CAME the gradient with each element clipped. Also v."""
    if RULES.came:
        v = second_moment(row, grad, numbers, maps, offsets, mask, RULES)
        scaled = tl.where(mask, grad * tl.rsqrt(v), 0.0)
    else:
        bound = tl.load(numbers + _CLIP_BOUND)
        v = grad
        scaled = tl.minimum(tl.maximum(grad, -bound), bound)
    return scaled, v


@triton.jit
def scaled_gradient(row, tensor, total, sums, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """The scaled gradient sg, which has the gradient's sign, and the new second moment v."""
    grad = regularized(row, total, offsets, mask, RULES)
    scaled, v = unclipped(row, grad, numbers, maps, offsets, mask, RULES)
    return scaled * tensor_sum(sums, tensor, CLIP, RULES), v


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


# Multi-scale momenta --------------------------------------------------------------------------------------------


@triton.jit
def remembered(row, entries, numbers, offsets, mask, RULES: tl.constexpr):
    """What the weighted mean of the momenta is without this step's gradient, and the share that this one has.

    It comes before the gradient is known: what unpacks low rank needs most of the registers there are.
    """
    mean = tl.zeros_like(offsets).to(tl.float32)
    share_of_gradient = 0.0
    for place in range(0, RULES.momenta):
        entry = entries + place * MOMENTUM_FIELDS
        kind, address = tl.load(entry + KIND), tl.load(entry + ADDRESS)
        share, rate = momentum_number(numbers, place, MEAN_SHARE), momentum_number(numbers, place, RATE)
        if (kind == LOW_RANK) | (kind == LOW_RANK_OF_SHARD):
            m = _low_rank_product(entry, address, offsets, mask)  # It was updated before.
            rate *= 0.0
        else:
            if kind == FLOAT:
                m = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask, other=0.0)
            else:
                scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
                m = load_levels(address, room_of(row, RULES), offsets, mask) * scale
        mean += share * (1 - rate) * m
        share_of_gradient += share * rate
    return mean, share_of_gradient


@triton.jit
def drive_of(mean, share_of_gradient, sg, RULES: tl.constexpr):
    """The weighted mean of the momenta, those that are due updated by sg; sg itself while there are none."""
    drive = sg
    if RULES.momenta > 0:
        drive = tl.where(sg == 0, 0.0, mean + share_of_gradient * sg)  # What has no gradient must not drift.
    return drive


@triton.jit
def _low_rank_product(entry, address, offsets, mask):
    """Elements of the product of two factors: that of element (i, j) of the folded matrix is L_i . R_j."""
    columns = tl.load(entry + FOLDED_COLUMNS).to(tl.int32)
    lefts, rights = address.to(tl.pointer_type(tl.int8)), tl.load(entry + RIGHT).to(tl.pointer_type(tl.int8))
    left_step, right_step = tl.load(entry + LEFT_STEP), tl.load(entry + RIGHT_STEP)
    scales = tl.load(entry + SCALE).to(tl.pointer_type(tl.float32))
    places = offsets + tl.load(entry + LEAD).to(tl.int32)
    i = places // columns
    j = places - i * columns
    product = tl.zeros_like(offsets).to(tl.float32)
    for q in range(0, tl.load(entry + RANK).to(tl.int32)):
        left = tl.load(lefts + q * left_step + i, mask, other=0).to(tl.float32)
        right = tl.load(rights + q * right_step + j, mask, other=0).to(tl.float32)
        product += (left * tl.load(scales + q)) * right
    return product


# Momentum and update --------------------------------------------------------------------------------------------


@triton.jit
def torque_aware(row, exp_avg, drive, norms, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """TAM: the new momentum and the new s; `norms` are the products of both column norms."""
    s = load_state(row, S, SIGNED, maps, offsets, mask, RULES)
    s += (exp_avg * drive / norms - s) * _TORQUE
    return exp_avg * _TORQUE_DECAY + 0.5 * (s + (1 + 2 * tl.load(numbers + _EPS1))) * drive, s


@triton.jit
def new_momentum(row, column_norms, sg, drive, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """The new momentum, the residual that the belief averages, and the new s."""
    exp_avg = load_state(row, EXP_AVG, SIGNED, maps, offsets, mask, RULES)
    if RULES.early:
        columns = offsets % tl.load(row + COLUMNS).to(tl.int32)
        norms = tl.load(column_norms + columns, mask, other=1.0)
        exp_avg, s = torque_aware(row, exp_avg, drive, norms, numbers, maps, offsets, mask, RULES)
        residual = sg - exp_avg
    else:
        s = exp_avg
        exp_avg += tl.load(numbers + _MOMENTUM_RATE) * (drive - exp_avg)
        beta1 = tl.load(numbers + _BETA1)
        # bar = b1 exp_avg + (1 - b1) drive
        residual = beta1 * (sg - exp_avg) if RULES.momenta == 0 else sg - beta1 * exp_avg - (1 - beta1) * drive
    return exp_avg, residual, s


@triton.jit
def divided_by_belief(row, exp_avg, residual, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """AdaBelief: r = b3 r + (1 - b3) (residual^2 + eps2); the update u = m / sqrt(r), from -10 to 10.

    Also r.
    """
    r = load_state(row, EXP_AVG_RES, ROOT, maps, offsets, mask, RULES)
    rate = tl.load(numbers + _RESIDUAL_RATE)
    r = r + rate * (tl.load(numbers + _EPS2) - r) + rate * residual * residual
    u = tl.where(mask, tl.rsqrt(r) * exp_avg, 0.0) * tl.load(numbers + _CORRECTION)
    return tl.minimum(tl.maximum(u, -_LONGEST), _LONGEST), r


@triton.jit
def turned_to_gradient(u, direction, numbers):
    """Grams: u = a |u| sign(grad) + (1 - a) u."""
    share = tl.load(numbers + _SHARE)
    towards = tl.abs(u) * direction
    return tl.where(share < 0.5, u + share * (towards - u), towards - (towards - u) * (1 - share))


@triton.jit
def update_of(
    row, tensor, entries, column_norms, total, sums, numbers, maps, offsets, mask, RULES: tl.constexpr
):  # fmt: skip
    """All rules up to Grams: the update u, and sign(grad)."""
    mean, share = remembered(row, entries, numbers, offsets, mask, RULES)
    sg, _ = scaled_gradient(row, tensor, total, sums, numbers, maps, offsets, mask, RULES)
    drive = drive_of(mean, share, sg, RULES)
    exp_avg, residual, _ = new_momentum(row, column_norms, sg, drive, numbers, maps, offsets, mask, RULES)
    u, _ = divided_by_belief(row, exp_avg, residual, numbers, maps, offsets, mask, RULES)
    direction = sign(sg)
    return turned_to_gradient(u, direction, numbers), direction


@triton.jit
def across_weights(u, p, tensor, sums, RULES: tl.constexpr):
    """The orthogonal gradient: u without its part along the weights, as long as before."""
    along, factor = tensor_sum(sums, tensor, ALONG, RULES), tensor_sum(sums, tensor, ACROSS, RULES)
    return (u - along * p) * factor


@triton.jit
def bumped_mask(row, direction, numbers, maps, offsets, mask, RULES: tl.constexpr):
    """The learning-rate mask, raised where the sign is that of the step before, and lowered where not."""
    rates = load_state(row, LR_MASK, EVEN, maps, offsets, mask, RULES)
    if RULES.bumps:
        last = load_truths(row, LAST_POLARITY, offsets, mask, RULES)
        differs = ((direction > 0).to(tl.int32) ^ last).to(tl.float32)
        bump = tl.load(numbers + _BUMP)
        rates += differs * (-2 * bump) + bump
        rates = tl.minimum(tl.maximum(rates, tl.load(numbers + _MIN_LR)), tl.load(numbers + _MAX_LR))
    return rates

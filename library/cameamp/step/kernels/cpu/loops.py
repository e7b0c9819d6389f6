"""The rules on one block of a tensor, each function one loop, in as few passes over memory as the sums allow.

What is updated in place is named first; a block of a state that is coded is decoded before and encoded after. Loops
over lanes go on to the end of the last sixteen elements, so arrays are as long as that, whatever a block's length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from . import eights, rules
from .jit import fetch, jit, within
from .lanes import (
    LANES,
    alike,
    choose,
    double_zeros,
    doubled,
    larger,
    largest_of,
    load,
    load_at,
    load_truths,
    magnitude,
    store,
    store_at,
    store_truths,
    sum_of,
    zeros,
)

_f = numpy.float32
_d = numpy.float64

# From so many columns on, a row is long enough for a loop of its own.
_WIDE = 64

# The first pass over gradients ----------------------------------------------------------------------------------


@jit
def _usable(x):
    return x if abs(x) <= rules._LARGEST_MAGNITUDE else _f(0.0)


class Found(NamedTuple):
    """What is found of gradients.

    Attributes:
        total: the sum of |g|.
        nonzero: how many elements are not 0.
        unusable: how many are not usable.
        largest: the largest |g|.
    """

    total: float
    nonzero: float
    unusable: float
    largest: float


@within
def _seen(found, x):
    """What is found with sixteen more elements."""
    size = magnitude(rules.usable(x))
    return Found(
        found.total + size,
        found.nonzero + choose(size > _f(0.0), _f(1.0), _f(0.0)),
        found.unusable + choose(magnitude(x) <= rules._LARGEST_MAGNITUDE, _f(0.0), _f(1.0)),
        larger(size, found.largest),
    )


@within
def _over_lanes(found):
    return Found(sum_of(found.total), sum_of(found.nonzero), sum_of(found.unusable), largest_of(found.largest))


@jit
def measure(g):
    """What is found of a block."""
    found = Found(zeros(), zeros(), zeros(), zeros())
    for i in range(0, len(g), LANES):
        found = _seen(found, load(g, i))
    return _over_lanes(found)


@jit
def squared_deviations(g, mean):
    """The sum of (|g| - mean)^2."""
    total = _f(0.0)
    for i in range(len(g)):
        deviation = abs(_usable(g[i])) - mean
        total += deviation * deviation
    return total


# The scaled gradient --------------------------------------------------------------------------------------------


class Scaling(NamedTuple):
    """How a gradient is scaled.

    Attributes:
        share: 1 / S, of AGR.
        came: whether by its second moment; else it is clipped.
        rate: of the second moment.
        eps: its floor.
        bound: of a clipped element.
        factor: of the scaled gradient.
    """

    share: float
    came: bool
    rate: float
    eps: float
    bound: float
    factor: float


@within
def _gradient(g, i, how):
    return rules.regularized(rules.usable(load(g, i)), how.share)


@within
def _moment(grad, exp_avg_sq, i, how):
    """The new second moment; without CAME anything."""
    return rules.mean_square(load(exp_avg_sq, i), grad, how.rate, how.eps) if how.came else grad


@within
def _scaled(grad, moment, how):
    return rules.scaled(grad, moment, how.factor) if how.came else rules.clipped(grad, how.bound)


@jit
def sum_scaled(g, exp_avg_sq, how, ahead):
    """The sum of squares of the gradient over the root of its new second moment; `ahead` as of `take_step`."""
    total = zeros()
    for i in range(0, len(g), LANES):
        if ahead:
            fetch(g, i + ahead)
            fetch(exp_avg_sq, i + ahead)
        grad = _gradient(g, i, how)
        total = total + grad * grad / _moment(grad, exp_avg_sq, i, how)
    return sum_of(total)


@jit
def measure_and_sum(g, exp_avg_sq, how, ahead):
    """Both `measure` and `sum_scaled` in one pass, of gradients that AGR leaves as they are."""
    found, total = Found(zeros(), zeros(), zeros(), zeros()), zeros()
    for i in range(0, len(g), LANES):
        if ahead:
            fetch(g, i + ahead)
            fetch(exp_avg_sq, i + ahead)
        x = load(g, i)
        found = _seen(found, x)
        grad = rules.usable(x)
        total = total + grad * grad / _moment(grad, exp_avg_sq, i, how)
    return _over_lanes(found), sum_of(total)


@jit
def scale_gradient(g, exp_avg_sq, how, sg):
    """The scaled gradient, and its sum of squares; the second moment stays as it is."""
    total = zeros()
    for i in range(0, len(g), LANES):
        grad = _gradient(g, i, how)
        scaled = _scaled(grad, _moment(grad, exp_avg_sq, i, how), how)
        total = total + scaled * scaled
        store(scaled, sg, i)
    return sum_of(total)


# The update, up to Grams ----------------------------------------------------------------------------------------


class Following(NamedTuple):
    """How the averages follow the scaled gradient; as in `settings.SETTINGS`."""

    early: bool
    eps1: float
    momentum_rate: float
    beta1: float
    rate3: float
    eps2: float
    correction: float
    gradient_share: float


class Given(NamedTuple):
    """What a block's update is computed from. Arrays that a rule does not ask for may be any.

    Attributes:
        g: the gradient.
        exp_avg_sq, exp_avg, exp_avg_res, s: the states.
        sg: the scaled gradient, if it is known already, as if its factor were 1.
        drive: what drives the momentum where there is a gradient, if that is not the scaled gradient.
        norms: early, of each element's column.
        is_known, is_driven: whether there are these two.
    """

    g: Any
    exp_avg_sq: Any
    exp_avg: Any
    exp_avg_res: Any
    s: Any
    sg: Any
    drive: Any
    norms: Any
    is_known: bool
    is_driven: bool


@within
def _updated(given, i, scaling, how):
    """The scaled gradient and the update, and the new states that lead to it."""
    grad = _gradient(given.g, i, scaling)
    exp_avg_sq = _moment(grad, given.exp_avg_sq, i, scaling)
    sg = scaling.factor * load(given.sg, i) if given.is_known else _scaled(grad, exp_avg_sq, scaling)
    drive = sg
    if given.is_driven:
        # What never had a gradient must not drift.
        drive = choose(magnitude(sg) > _f(0.0), load(given.drive, i), _f(0.0))
    exp_avg = load(given.exp_avg, i)
    s = exp_avg
    if how.early:
        s = rules.correlated(load(given.s, i), exp_avg, drive, load(given.norms, i))
        exp_avg = rules.damped(exp_avg, s, drive, how.eps1)
        residual = sg - exp_avg
    else:
        exp_avg = rules.averaged(exp_avg, drive, how.momentum_rate)
        residual = rules.inconsistency(sg, exp_avg, drive, how.beta1)
    exp_avg_res = rules.mean_square(load(given.exp_avg_res, i), residual, how.rate3, how.eps2)
    u = rules.turned(rules.believed(exp_avg, exp_avg_res, how.correction), sg, how.gradient_share)
    return grad, sg, u, exp_avg_sq, exp_avg, exp_avg_res, s


# What depends on a whole tensor ---------------------------------------------------------------------------------


@jit
def products(given, p, scaling, how):
    """u.p, p.p and u.u, in float64: weights may be so small that their squares are 0 in float32."""
    up, pp, uu = double_zeros(), double_zeros(), double_zeros()
    for i in range(0, len(p), LANES):
        _, _, u, _, _, _, _ = _updated(given, i, scaling, how)
        wide_u, wide_p = doubled(u), doubled(load(p, i))
        up = up + wide_u * wide_p
        pp = pp + wide_p * wide_p
        uu = uu + wide_u * wide_u
    return sum_of(up), sum_of(pp), sum_of(uu)


@jit
def count_agreement(given, p, scaling, how, along, lengthening):
    """How many elements of the update, without its part along the weights, agree in sign with the gradient."""
    count = zeros()
    for i in range(0, len(p), LANES):
        _, sg, u, _, _, _, _ = _updated(given, i, scaling, how)
        agrees = rules.agrees(rules.across(u, load(p, i), along, lengthening), sg)
        count = count + choose(agrees, _f(1.0), _f(0.0))
    return sum_of(count)


class Advanced(NamedTuple):
    """What the update of a block is summed to: `products`, and how many of its elements agree with the gradient."""

    up: float
    pp: float
    uu: float
    agreeing: float


@within
def advance(given, p, scaling, how, update, ahead):
    """Update the states of a block that lead to its update, and write that down; `ahead` as of `take_step`."""
    up, pp, uu, agreeing = double_zeros(), double_zeros(), double_zeros(), zeros()
    for i in range(0, len(p), LANES):
        if ahead:
            fetch(given.exp_avg, i + ahead)
            fetch(given.exp_avg_res, i + ahead)
            fetch(p, i + ahead)
        grad, _, u, exp_avg_sq, exp_avg, exp_avg_res, s = _updated(given, i, scaling, how)
        if scaling.came:
            store(exp_avg_sq, given.exp_avg_sq, i)
        store(exp_avg, given.exp_avg, i)
        store(exp_avg_res, given.exp_avg_res, i)
        if how.early:
            store(s, given.s, i)
        store(u, update, i)
        if how.early:
            wide_u, wide_p = doubled(u), doubled(load(p, i))
            up = up + wide_u * wide_p
            pp = pp + wide_p * wide_p
            uu = uu + wide_u * wide_u
        else:
            agreeing = agreeing + choose(rules.agrees(u, grad), _f(1.0), _f(0.0))
    return Advanced(sum_of(up), sum_of(pp), sum_of(uu), sum_of(agreeing))


@jit
def count_agreeing(g, p, update, scaling, along, lengthening):
    """As `count_agreement`, of an update that is written down."""
    count = zeros()
    for i in range(0, len(p), LANES):
        u = rules.across(load(update, i), load(p, i), along, lengthening)
        count = count + choose(rules.agrees(u, _gradient(g, i, scaling)), _f(1.0), _f(0.0))
    return sum_of(count)


# The step -------------------------------------------------------------------------------------------------------


class Moving(NamedTuple):
    """How the weights move.

    Attributes:
        along, lengthening: OrthoGrad's two factors.
        is_cautious, kept: whether disagreeing elements are masked, and the factor of those that are kept.
        decay: strength of the weight decay.
        warmup, has_polarity: whether the mask is adjusted, and whether there are signs of the step before.
        bump, low, high: by how much, and its bounds.
        multiplier: of the mask.
        is_watched: whether the context sees the step.
    """

    along: float
    lengthening: float
    is_cautious: bool
    kept: float
    decay: float
    warmup: bool
    has_polarity: bool
    bump: float
    low: float
    high: float
    multiplier: float
    is_watched: bool


class Places(NamedTuple):
    """Addresses of what is moved with the weights. Arrays would be counted by numba wherever a function takes them.

    Attributes:
        p, lr_mask: of the weights and the mask.
        now: of bytes that are filled with the signs of the gradient, if the mask is adjusted.
        before: of those of the step before.
        rates: of factors of the mask, which become what is taken off the weights if somebody watches.
    """

    p: int
    lr_mask: int
    now: int
    before: int
    rates: int


@within
def _move(u, grad, places, i, moving):
    """Adjust the mask, and take an update off the weights."""
    mask, weights = load_at(places.lr_mask, i), load_at(places.p, i)
    if moving.warmup:
        signs = grad > _f(0.0)
        store_truths(signs, places.now, i)
        if moving.has_polarity:
            agrees = alike(signs, load_truths(places.before, i))
            mask = rules.bumped(mask, agrees, moving.bump, moving.low, moving.high)
            store_at(mask, places.lr_mask, i)
    u = rules.across(u, weights, moving.along, moving.lengthening)
    if moving.is_cautious:
        u = choose(rules.agrees(u, grad), moving.kept * u, _f(0.0))
    rate = mask * moving.multiplier * load_at(places.rates, i)
    change = rate * (u + moving.decay * weights)
    store_at(weights - change, places.p, i)
    if moving.is_watched:
        store_at(change, places.rates, i)


@within
def take_step(p, lr_mask, now, given, before, rates, scaling, how, moving, ahead):
    """Update the states, the mask and the weights of a block.

    Args:
        p, lr_mask, now, before, rates: see `Places`.
        given, scaling, how: as of `_updated`. The states are updated, and `given.sg`, unless it is known, is filled
            with the scaled gradient if somebody watches.
        moving: how the weights move.
        ahead: how many elements ahead of their use states and weights are fetched from memory; 0 for not at all.
    """
    places = Places(p.ctypes.data, lr_mask.ctypes.data, now.ctypes.data, before.ctypes.data, rates.ctypes.data)
    for i in range(0, len(p), LANES):
        if ahead:
            fetch(given.exp_avg, i + ahead)
            fetch(given.exp_avg_res, i + ahead)
            fetch(lr_mask, i + ahead)
            fetch(p, i + ahead)
        grad, sg, u, exp_avg_sq, exp_avg, exp_avg_res, s = _updated(given, i, scaling, how)
        if scaling.came:
            store(exp_avg_sq, given.exp_avg_sq, i)
        store(exp_avg, given.exp_avg, i)
        store(exp_avg_res, given.exp_avg_res, i)
        if how.early:
            store(s, given.s, i)
        if moving.is_watched and not given.is_known:
            store(sg, given.sg, i)
        _move(u, grad, places, i, moving)


@within
def move(p, lr_mask, now, g, update, before, rates, scaling, moving, ahead):
    """The rest of `take_step`, of an update that `advance` has written down."""
    places = Places(p.ctypes.data, lr_mask.ctypes.data, now.ctypes.data, before.ctypes.data, rates.ctypes.data)
    for i in range(0, len(p), LANES):
        if ahead:
            fetch(lr_mask, i + ahead)
        _move(load(update, i), _gradient(g, i, scaling), places, i, moving)


@jit
def add_squares(x, out):
    """out = out + x^2."""
    for i in range(len(x)):
        out[i] += x[i] * x[i]


@jit
def add_squares_by_column(x, column, out):
    """out = out + x^2 of whole sixteens, the first of which is of a column; rows are whole sixteens."""
    for i in range(0, len(x), LANES):
        value = load(x, i)
        store(load(out, column) + value * value, out, column)
        column += LANES
        if column == len(out):
            column = 0


@jit
def repeat(columns, column, out):
    """One value a column in each of whole sixteens, from a column on; likewise."""
    for i in range(0, len(out), LANES):
        store(load(columns, column), out, i)
        column += LANES
        if column == len(columns):
            column = 0


@jit
def row_squares(x, columns, out):
    """out = the sum of squares of each row of whole rows."""
    if columns % 8 == 0 and columns < _WIDE:
        eights.row_squares(len(out), columns // 8, x.ctypes.data, out.ctypes.data)
        return
    for row in range(len(out)):
        out[row] = sum_of_squares(x[row * columns : (row + 1) * columns])


@jit
def row_factors(squares, softening):
    """ALLoRA: 1 / sqrt(norm + 1 / eta^2) of each row, in place of the squares of their norms."""
    for i in range(len(squares)):
        squares[i] = _f(1.0) / numpy.sqrt(numpy.sqrt(squares[i]) + softening)


@jit
def fill_rows(out, columns, factors, common):
    """Each of whole rows filled with its factor, times a common one."""
    if columns % 8 == 0 and columns < _WIDE:
        eights.fill_rows(len(factors), columns // 8, factors.ctypes.data, common, out.ctypes.data)
        return
    for row in range(len(factors)):
        fill(out[row * columns : (row + 1) * columns], factors[row] * common)


# Vectors --------------------------------------------------------------------------------------------------------


@jit
def sum_of_squares(x):
    total = _f(0.0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total


@jit
def dot(x, y):
    total = _f(0.0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@jit
def fill(x, value):
    for i in range(len(x)):
        x[i] = value


@jit
def copy(x, out):
    for i in range(len(x)):
        out[i] = x[i]


@jit
def scale(x, factor):
    for i in range(len(x)):
        x[i] *= factor


@jit
def add_scaled(x, factor, out):
    for i in range(len(x)):
        out[i] += factor * x[i]


@jit
def keep_where_gradient(x, sg):
    """0 where the gradient is exactly 0: what never had a gradient must not drift."""
    for i in range(len(x)):
        x[i] = _f(0.0) if sg[i] == _f(0.0) else x[i]


@jit
def sample(x, factor, start, every, out):
    """Every n-th element of a tensor, of which factor * x is the part from `start` on."""
    for place in range(-(-start // every), -(-(start + len(x)) // every)):
        out[place] = factor * x[place * every - start]


@jit
def sample_gradient(g, start, every, out):
    """The same of a gradient, whose unusable elements are 0."""
    for place in range(-(-start // every), -(-(start + len(g)) // every)):
        out[place] = _usable(g[place * every - start])

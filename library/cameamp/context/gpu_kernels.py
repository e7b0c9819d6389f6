"""The context in Triton kernels of a single program each.

They find the values that `controller.py` and `detection.py` find by some hundred small operations.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import controller, detection

# What is known of two samples, after three numbers that are averaged over ranks with it.
REPORTED, REPORTS, LOST = 0, 1, 2
NUMBERS = 7
_REPORTED, _REPORTS, _LOST = tl.constexpr(REPORTED), tl.constexpr(REPORTS), tl.constexpr(LOST)
_DOT, _X_SQUARE, _Y_SQUARE, _MEAN_SQUARE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)

_FEWEST_LOSSES, _FEWEST_COSINES = tl.constexpr(detection.FEWEST_LOSSES), tl.constexpr(detection.FEWEST_COSINES)
_RECENT = tl.constexpr(detection.RECENT_COSINES)
_DEVIATIONS_PER_MAD = tl.constexpr(detection.DEVIATIONS_PER_MAD)
_MAD_EFFICIENCY = tl.constexpr(detection.MAD_EFFICIENCY)
_HALF_PI, _ROOT_HALF = tl.constexpr(math.pi / 2), tl.constexpr(math.sqrt(0.5))
_TINY = tl.constexpr(1.1754943508222875e-38)

_EDGE_SHARE, _FLOOR = tl.constexpr(controller.EDGE_SHARE), tl.constexpr(controller.FLOOR)
_MOST_GROWTH = tl.constexpr(controller.MOST_GROWTH)
_PACED_DOWN_FROM = tl.constexpr(controller.PACED_DOWN_FROM)
_SMALLEST = tl.constexpr(1e-30)


# Samples --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["size"])
def compare_samples(last, sample, loss, lost, added, newest, found, kept, size, CHUNK: tl.constexpr,
                    BEGUN: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_LOST: tl.constexpr):  # fmt: skip
    """x.y, x.x and y.y of the last sample x and another one y, both scaled to a largest magnitude of 1.

    Args:
        last: the last sample, in bfloat16; BEGUN is false where there is none, which counts as zeros.
        sample: what it is compared with, float32.
        loss, lost: the loss and how many elements were unusable, if HAS_LOSS and HAS_LOST.
        added: what is added to the last sample for the next step, float32; in units of its root mean square, unless
            nothing is kept.
        newest: the sum in bfloat16, to be filled.
        found: NUMBERS float32, to be filled.
        kept: the share of the last sample that is in the sum.
        size: of the samples.
    """
    largest_x = tl.zeros([CHUNK], dtype=tl.float32)
    largest_y = tl.zeros([CHUNK], dtype=tl.float32)
    squares = tl.zeros([CHUNK], dtype=tl.float32)
    for start in range(0, size, CHUNK):
        i = start + tl.arange(0, CHUNK)
        largest_x = tl.maximum(largest_x, tl.abs(_last(last, i, size, BEGUN)))
        largest_y = tl.maximum(largest_y, tl.abs(tl.load(sample + i, i < size, other=0.0)))
        more = tl.load(added + i, i < size, other=0.0)
        squares += more * more
    mean_square = tl.sum(squares, axis=0) / size
    unit = tl.where((kept > 0) & (mean_square > 0), tl.sqrt_rn(mean_square), 1.0)
    unit_x = tl.maximum(tl.max(largest_x, axis=0), _SMALLEST)
    unit_y = tl.maximum(tl.max(largest_y, axis=0), _SMALLEST)
    dot = tl.zeros([CHUNK], dtype=tl.float32)
    x_square = tl.zeros([CHUNK], dtype=tl.float32)
    y_square = tl.zeros([CHUNK], dtype=tl.float32)
    for start in range(0, size, CHUNK):
        i = start + tl.arange(0, CHUNK)
        x = _last(last, i, size, BEGUN) / unit_x
        y = tl.load(sample + i, i < size, other=0.0) / unit_y
        direction = tl.load(added + i, i < size, other=0.0) / unit
        tl.store(newest + i, _bfloat16(_last(last, i, size, BEGUN) * kept + direction), i < size)
        dot += x * y
        x_square += x * x
        y_square += y * y
    tl.store(found + _DOT, tl.sum(dot, axis=0))
    tl.store(found + _X_SQUARE, tl.sum(x_square, axis=0))
    tl.store(found + _Y_SQUARE, tl.sum(y_square, axis=0))
    tl.store(found + _MEAN_SQUARE, mean_square)
    reported = tl.load(loss) if HAS_LOSS else 0.0
    tl.store(found + _REPORTED, reported)
    tl.store(found + _REPORTS, 1.0 if HAS_LOSS else 0.0)
    tl.store(found + _LOST, tl.load(lost).to(tl.float32) if HAS_LOST else 0.0)


@triton.jit
def _last(last, i, size, BEGUN: tl.constexpr):
    if BEGUN:
        bits = tl.load(last + i, i < size, other=0).to(tl.uint32) << 16
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = tl.zeros_like(i).to(tl.float32)
    return x


@triton.jit
def _bfloat16(x):
    """The upper half of the bits of the nearest bfloat16, of two the even one."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def _cosine(found, absent):
    """The cosine of the two samples; `absent` where one of them is 0."""
    dot, x_square, y_square = tl.load(found + _DOT), tl.load(found + _X_SQUARE), tl.load(found + _Y_SQUARE)
    present = (x_square > 0) & (y_square > 0)
    return tl.where(present, dot / tl.sqrt_rn(tl.where(present, x_square * y_square, 1.0)), absent)


# Before a step --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["window"])
def update_context(
    found, multiplier, edge_cases, losses, cosines, rates, lr, start, threshold, scalars, new_cases, new_losses,
    new_cosines, new_rates, window, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Histories, confidence, and the multiplier of this step; as `ContextualOptimizationModule.update_context`.

    Args:
        found: from `compare_samples`.
        multiplier, edge_cases, losses, cosines, rates: the memory's.
        lr: the largest learning rate of a group.
        start: the multiplier's first value.
        threshold: confidence at which a step is an edge case.
        scalars: the multiplier, the confidence, and the multiplier of this step, to be filled.
        new_cases, new_losses, new_cosines, new_rates: the memory after this step, likewise.
        window: how many steps are remembered, WIDTH at most.
    """
    reports = tl.load(found + _REPORTS)
    loss = tl.load(found + _REPORTED) / tl.where(reports > 0, reports, float("nan"))
    cosine = _cosine(found, float("nan"))
    i = tl.arange(0, WIDTH)
    tl.store(new_losses + i, _newest_last(losses, loss, i, window), i < window)
    tl.store(new_cosines + i, _newest_last(cosines, cosine, i, window), i < window)

    broken = (tl.load(found + _LOST) > 0) | ((reports > 0) & (loss - loss != 0))
    p_spike = _spike(losses, loss, window, WIDTH, CHUNK)
    p_rise = _rise(losses, loss, window, WIDTH, CHUNK)
    p_oscillation = _oscillation(cosines, cosine, window, WIDTH)
    tests = (p_spike < 1).to(tl.float32) + (p_rise < 1).to(tl.float32) + (p_oscillation < 1).to(tl.float32)
    least = tl.minimum(tl.minimum(p_spike, p_rise), p_oscillation)
    sure = tl.where(least < 1, tl.exp(tl.maximum(tests, 1.0) * tl.log(1 - tl.minimum(least, 0.9999999))), 0.0)
    confidence = tl.where(broken, 1.0, sure)

    is_edge_case = confidence >= threshold
    value = tl.load(multiplier)
    value = tl.where(value == value, value, start)
    used = tl.where(is_edge_case, value * _EDGE_SHARE, value)
    tl.store(scalars, value)
    tl.store(scalars + 1, confidence)
    tl.store(scalars + 2, used)
    tl.store(new_cases, tl.load(edge_cases) + is_edge_case.to(tl.int64))
    tl.store(new_rates + i, _newest_last(rates, used * lr, i, window), i < window)


@triton.jit
def _newest_last(history, newest, i, window):
    """Entries of a history with a new one at its end; NaN beyond it."""
    entries = tl.load(history + i + 1, i + 1 < window, other=float("nan"))
    return tl.where(i + 1 == window, newest, entries)


@triton.jit
def _finite(x):
    """NaN where a number is not finite."""
    return x + (x - x)


@triton.jit
def _p_value(t, freedom, enough):
    """As `detection.p_values`, of one test."""
    size = tl.sqrt_rn(freedom * tl.log(1 + t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    size = tl.where(t < 0, -size, size)
    p = 0.5 * (1 - tl.math.erf(size * _ROOT_HALF))
    return tl.where(enough & (p == p), p, 1.0)


@triton.jit
def _spike(losses, newest, window, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """As `detection.spike`: the newest loss against the median of the others and their median deviation from it."""
    i = tl.arange(0, WIDTH)
    values = _finite(_newest_last(losses, newest, i, window))
    positive = tl.min(tl.where(values == values, values, 1.0), axis=0) > 0
    others = tl.where(i + 1 < window, values, float("nan"))
    count = tl.sum((others == others).to(tl.float32), axis=0)
    middle = tl.floor(tl.maximum(count - 1, 0.0) / 2)
    median = _in_order(losses, newest, positive, 0.0, middle, window, WIDTH, CHUNK, False)
    spread = _in_order(losses, newest, positive, median, middle, window, WIDTH, CHUNK, True) * _DEVIATIONS_PER_MAD
    size = tl.where(positive, tl.maximum(tl.abs(median), 1.0), tl.abs(median))
    at_least_one = tl.maximum(count, 1.0)
    error = tl.maximum(spread * tl.sqrt_rn(1 + _of_count(at_least_one)), size * 1e-6 + 1e-12)
    last = _on_scale(_finite(newest), positive)
    t = (last - median) / error
    return _p_value(t, at_least_one * _MAD_EFFICIENCY, (count >= _FEWEST_LOSSES) & (last == last))


@triton.jit
def _of_count(count):
    """The variance of a median beside that of one value."""
    return tl.full([], _HALF_PI, tl.float32) / count


@triton.jit
def _on_scale(values, positive):
    """Losses where their noise is closest to Gaussian: logarithms, where all are positive."""
    return tl.where(positive, tl.log(tl.where(positive, tl.maximum(values, _TINY), 1.0)), values) + (values - values)


@triton.jit
def _in_order(
    losses, newest, positive, center, place, window, WIDTH: tl.constexpr, CHUNK: tl.constexpr, APART: tl.constexpr
):  # fmt: skip
    """The loss at a place in ascending order, without the newest one; with APART the deviation from `center`."""
    i = tl.arange(0, WIDTH)
    values = _entry(losses, newest, positive, center, i, window, APART)
    rank = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(0, window, CHUNK):
        j = start + tl.arange(0, CHUNK)
        others = _entry(losses, newest, positive, center, j, window, APART)[None, :]
        before = (others < values[:, None]) | ((others == values[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum(before.to(tl.float32), axis=1)
    return tl.sum(tl.where((values == values) & (rank == place), values, 0.0), axis=0)


@triton.jit
def _entry(losses, newest, positive, center, i, window, APART: tl.constexpr):
    values = _on_scale(_finite(_newest_last(losses, newest, i, window)), positive)
    values = tl.where(i + 1 < window, values, float("nan"))
    return tl.abs(values - center) if APART else values


@triton.jit
def _rise(losses, newest, window, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """As `detection.rising`: Spearman's rank correlation of the losses with time."""
    i = tl.arange(0, WIDTH)
    values = _finite(_newest_last(losses, newest, i, window))
    known = (values == values).to(tl.float32)
    count = tl.sum(known, axis=0)
    ranks = tl.zeros([WIDTH], dtype=tl.float32)
    number = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(0, window, CHUNK):
        j = start + tl.arange(0, CHUNK)
        others = _finite(_newest_last(losses, newest, j, window))[None, :]
        below = (others < values[:, None]).to(tl.float32) + (others <= values[:, None]).to(tl.float32)
        ranks += tl.sum(below, axis=1)
        earlier = (others == others) & (j[None, :] <= i[:, None])
        number += tl.sum(earlier.to(tl.float32), axis=1)
    x = (number - (count + 1) / 2) * known
    y = (ranks - count) * known
    scale = tl.sqrt_rn(tl.sum(x * x, axis=0) * tl.sum(y * y, axis=0))
    r = tl.sum(x * y, axis=0) / tl.maximum(scale, 1e-12)
    freedom = tl.maximum(count - 2, 1.0)
    t = r * tl.sqrt_rn(freedom / tl.maximum(1 - r * r, 1e-7))
    return _p_value(t, freedom, count >= _FEWEST_LOSSES)


@triton.jit
def _oscillation(cosines, newest, window, WIDTH: tl.constexpr):
    """As `detection.oscillating`: a t-test that the mean of the recent cosines is below 0."""
    i = tl.arange(0, WIDTH)
    values = _newest_last(cosines, newest, i, window)
    known = (values == values) & (i < window) & (i >= window - _RECENT)
    count = tl.sum(known.to(tl.float32), axis=0)
    at_least_one = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(known, values, 0.0), axis=0) / at_least_one
    apart = tl.where(known, values - mean, 0.0)
    freedom = tl.maximum(count - 1, 1.0)
    error = tl.maximum(tl.sqrt_rn(tl.sum(apart * apart, axis=0) / freedom / at_least_one), 1e-7)
    return _p_value(-mean / error, freedom, count >= _FEWEST_COSINES)


# After a step ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["window"])
def follow(
    found, multiplier, confidence, length, rates, square, gain, pace, share, threshold, highest, scalars, window
):  # fmt: skip
    """The multiplier of the next step, by how well the gradient agrees with the course; as `follow` there.

    Args:
        found: from `compare_samples`.
        multiplier, confidence, length, rates, square: the memory's; the last is the mean square of alignments.
        gain, pace, share: as of `controller.Pull`.
        threshold: confidence at which a step is an edge case.
        highest: the multiplier's bound, of steps of length 1.
        scalars: the multiplier, the alignment, the length and the mean square, to be filled.
        window: how many steps are remembered.
    """
    alignment = _cosine(found, 0.0)
    mean = tl.load(square)
    mean += share * (alignment * alignment - mean)
    before, rate = tl.load(length), tl.load(rates + window - 1)
    paced = (mean > 0) & ((alignment > 0) | (rate > _PACED_DOWN_FROM))
    strength = tl.maximum(tl.where(paced, pace / tl.sqrt_rn(tl.where(paced, mean, 1.0)), 0.0), gain)
    growth = tl.exp(tl.minimum(strength * alignment, _MOST_GROWTH))
    growth = tl.where(tl.load(confidence) >= threshold, tl.minimum(growth, 1.0), growth)
    newest = tl.sqrt_rn(tl.load(found + _MEAN_SQUARE)) / rate
    known = (newest > 0) & (newest < float("inf"))
    ratio = tl.where(known & (before > 0), before / tl.where(known, newest, 1.0), 1.0)
    newest = tl.where(known, newest, before)
    most = tl.maximum(highest / newest, _FLOOR)
    tl.store(scalars, tl.minimum(tl.maximum(tl.load(multiplier) * growth * ratio, _FLOOR), most))
    tl.store(scalars + 1, alignment)
    tl.store(scalars + 2, newest)
    tl.store(scalars + 3, mean)

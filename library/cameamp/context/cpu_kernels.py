"""The context in numba kernels: the values that `controller.py` and `detection.py` find by some hundred operations."""

from __future__ import annotations

import math

import numpy

from ..step.kernels.cpu.jit import as_bits, as_float, entry, exact, halves, jit, plain_floats
from . import controller, detection

# What is known of two samples, after three numbers that are averaged over ranks with it.
REPORTED, REPORTS, LOST, PRODUCTS = range(4)
DOT, X_SQUARE, Y_SQUARE, OF_SQUARES = range(4)

_f = numpy.float32
_u = numpy.uint32
_NAN = _f(math.nan)
_SMALLEST = _f(1e-30)
_TINY = float(numpy.finfo(numpy.float32).tiny)


# Samples --------------------------------------------------------------------------------------------------------


@entry
def compare_samples(last, sample, kept, newest, found):
    """x.y, x.x, y.y and x^2.y^2 of the last sample x and another one y, both scaled to a largest magnitude of 1.

    Args:
        last: address of the last sample, bfloat16; 0 if there is none, which counts as zeros.
        sample: what it is compared with.
        kept: what is to be compared with the sample of the next step, and
        newest: address of the same in bfloat16, to be filled.
        found: to be filled, float32.
    """
    sample, kept = plain_floats(sample), plain_floats(kept)
    size = len(sample)
    _to_bfloat16(kept, halves(newest, 0, size))
    for number in range(4):
        found[number] = _f(0.0)
    y_unit = max(_largest(sample), _SMALLEST)
    if last == 0:
        found[Y_SQUARE] = _square(sample, y_unit)
        return
    before = halves(last, 0, size)
    dot, x_square, y_square, of_squares = _products(before, sample, max(_largest_of_halves(before), _SMALLEST), y_unit)
    found[DOT], found[X_SQUARE], found[Y_SQUARE], found[OF_SQUARES] = dot, x_square, y_square, of_squares


@jit
def _largest(x):
    largest = _f(0.0)
    for i in range(len(x)):
        largest = max(largest, abs(x[i]))
    return largest


@jit
def _largest_of_halves(x):
    largest = _u(0)
    for i in range(len(x)):
        largest = max(largest, _u(x[i]) & _u(0x7FFF))
    return as_float(_u(largest << _u(16)))


@jit
def _square(y, unit):
    total = 0.0
    for i in range(len(y)):
        total += (y[i] / unit) * (y[i] / unit)
    return total


@jit
def _products(before, sample, x_unit, y_unit):
    dot, x_square, y_square, of_squares = 0.0, 0.0, 0.0, 0.0
    for i in range(len(sample)):
        x = as_float(_u(before[i]) << _u(16)) / x_unit
        y = sample[i] / y_unit
        both = x * y
        dot += both
        x_square += x * x
        y_square += y * y
        of_squares += both * both
    return dot, x_square, y_square, of_squares


@exact
def _to_bfloat16(x, out):
    """The nearest, of two the even one; NaN stays NaN."""
    for i in range(len(x)):
        bits = as_bits(x[i])
        nearest = _u(bits + _u(0x7FFF) + ((bits >> _u(16)) & _u(1))) >> _u(16)
        out[i] = numpy.uint16(nearest if x[i] == x[i] else _u(0x7FC0))


@jit
def _cosine(products, absent):
    """The cosine of the two samples; `absent` where one of them is 0."""
    x_square, y_square = float(products[X_SQUARE]), float(products[Y_SQUARE])
    if x_square > 0 and y_square > 0:
        return _f(products[DOT] / math.sqrt(x_square * y_square))
    return absent


# Before a step --------------------------------------------------------------------------------------------------


@entry
def update_context(found, multiplier, lr, start, threshold, losses, cosines, rates):
    """Histories, confidence, and the multiplier of this step; as `ContextualOptimizationModule.take_in`.

    Args:
        found: what is known of the step; see `PRODUCTS`.
        multiplier: the memory's.
        lr: the largest learning rate of a group.
        start: the multiplier's first value.
        threshold: confidence at which a step is an edge case.
        losses, cosines, rates: histories with room for this step at their ends, which is filled.

    Returns:
        The multiplier, the confidence, whether this is an edge case, and the multiplier of this step.
    """
    reports = found[REPORTS]
    loss = _f(found[REPORTED] / reports) if reports > 0 else _NAN
    losses[-1] = loss
    cosines[-1] = _cosine(found[PRODUCTS:], _NAN)
    confidence = _f(1.0)
    if not (found[LOST] > 0 or (reports > 0 and not math.isfinite(loss))):
        confidence = _confidence(losses, cosines)
    is_edge_case = confidence >= threshold
    value = _f(start) if math.isnan(multiplier) else multiplier
    used = value * _f(controller.EDGE_SHARE) if is_edge_case else value
    rates[-1] = used * _f(lr)
    return value, confidence, is_edge_case, used


@exact
def _confidence(losses, cosines):
    """As `detection.confidence`."""
    known = _known(losses)
    p = (_spike(losses, known), _rising(known), _oscillating(cosines))
    least, tests = _f(1.0), 0
    for value in p:
        least = min(least, value)
        tests += value < _f(1.0)
    return _f(math.exp(max(tests, 1) * math.log1p(-least))) if least < _f(1.0) else _f(0.0)


@exact
def _known(window):
    """The entries that are finite, in their order."""
    known = numpy.empty(len(window), dtype=numpy.float32)
    count = 0
    for i in range(len(window)):
        if math.isfinite(window[i]):
            known[count] = window[i]
            count += 1
    return known[:count]


@exact
def _p_value(t, freedom):
    """As `detection.p_values`, of one test that has enough."""
    size = math.sqrt(freedom * math.log1p(t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    p = _f(0.5 * math.erfc(math.copysign(size, t) / math.sqrt(2.0)))
    return p if p == p else _f(1.0)


@exact
def _spike(losses, known):
    """As `detection.spike`: the newest loss against the median of the others and their median deviation from it."""
    newest = losses[-1]
    count = len(known) - 1
    if not math.isfinite(newest) or count < detection.FEWEST_LOSSES:
        return _f(1.0)
    values = numpy.empty(len(known), dtype=numpy.float64)
    positive = True
    for i in range(len(known)):
        positive = positive and known[i] > 0
    for i in range(len(known)):
        values[i] = _f(math.log(max(known[i], _TINY))) if positive else known[i]
    last, others = values[count], values[:count]
    _sort(others)
    median = others[(count - 1) // 2]
    size = max(abs(median), 1.0) if positive else abs(median)
    for i in range(count):
        others[i] = abs(others[i] - median)
    _sort(others)
    spread = others[(count - 1) // 2] * detection.DEVIATIONS_PER_MAD
    error = max(spread * math.sqrt(1 + math.pi / 2 / count), size * 1e-6 + 1e-12)
    return _p_value((last - median) / error, detection.MAD_EFFICIENCY * count)


@exact
def _rising(known):
    """As `detection.rising`: Spearman's rank correlation of the losses with time."""
    count = len(known)
    if count < detection.FEWEST_LOSSES:
        return _f(1.0)
    ordered = known.astype(numpy.float64)
    _sort(ordered)
    xy, xx, yy = 0.0, 0.0, 0.0
    for i in range(count):
        x = i + 1 - (count + 1) / 2
        y = _below(ordered, known[i], False) + _below(ordered, known[i], True) - count
        xy += x * y
        xx += x * x
        yy += y * y
    r = xy / max(math.sqrt(xx * yy), 1e-12)
    return _p_value(r * math.sqrt((count - 2) / max(1 - r * r, 1e-7)), count - 2.0)


@exact
def _oscillating(cosines):
    """As `detection.oscillating`: a t-test that the mean of the recent cosines is below 0."""
    total, count = 0.0, 0
    recent = cosines[max(len(cosines) - detection.RECENT_COSINES, 0) :]
    for i in range(len(recent)):
        if not math.isnan(recent[i]):
            total += recent[i]
            count += 1
    if count < detection.FEWEST_COSINES:
        return _f(1.0)
    mean, squares = total / count, 0.0
    for i in range(len(recent)):
        if not math.isnan(recent[i]):
            squares += (recent[i] - mean) ** 2
    error = max(math.sqrt(squares / (count - 1) / count), 1e-7)
    return _p_value(-mean / error, count - 1.0)


@exact
def _sort(x):
    """Shell's sort: windows are short, and numpy's takes a second to compile."""
    gap = len(x) // 2
    while gap > 0:
        for i in range(gap, len(x)):
            value, place = x[i], i
            while place >= gap and x[place - gap] > value:
                x[place] = x[place - gap]
                place -= gap
            x[place] = value
        gap //= 2


@exact
def _below(ordered, value, equal_too):
    """How many of some numbers in order are below a value, or `equal_too`."""
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        if ordered[middle] < value or (equal_too and ordered[middle] == value):
            low = middle + 1
        else:
            high = middle
    return low


# After a step ---------------------------------------------------------------------------------------------------


@entry
def follow(products, multiplier, confidence, total, variance, gain, offset, threshold, highest):
    """The multiplier of the next step, by how well the gradient agrees with the step before.

    Args:
        products: from `compare_samples`.
        multiplier, confidence, total, variance: the memory's.
        gain, offset: the law's, the adaptation rate included.
        threshold: confidence at which a step is an edge case.
        highest: the multiplier's bound.

    Returns:
        The multiplier, the alignment, their sum and its variance.
    """
    alignment = _cosine(products, _f(0.0))
    squares = products[X_SQUARE] * products[Y_SQUARE]
    new_total = total * _f(controller.KEPT) + alignment
    new_variance = variance * _f(controller.KEPT**2) + products[OF_SQUARES] / max(squares, _SMALLEST)
    is_evidence = new_total * new_total > _f(controller.EVIDENCE**2) * new_variance
    growth = math.exp(gain * (alignment + (offset if is_evidence else 0.0))) if products[X_SQUARE] > 0 else 1.0
    if confidence >= threshold:
        growth = min(growth, 1.0)
    value = min(max(multiplier * growth, controller.FLOOR), highest)
    return _f(value), alignment, new_total, new_variance

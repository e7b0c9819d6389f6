"""The context in numba kernels: the values that `controller.py` and `detection.py` find by some hundred operations."""

from __future__ import annotations

import math

import numpy

from ..step.kernels.cpu.jit import as_bits, as_float, entry, exact, halves, inlined, jit, plain_floats
from . import controller, detection

# What is known of two samples, after three numbers that are averaged over ranks with it.
REPORTED, REPORTS, LOST, PRODUCTS = range(4)
DOT, X_SQUARE, Y_SQUARE, MEAN_SQUARE = range(4)

_f = numpy.float32
_u = numpy.uint32
_NAN = _f(math.nan)
_SMALLEST = _f(1e-30)
_TINY = float(numpy.finfo(numpy.float32).tiny)


# Samples --------------------------------------------------------------------------------------------------------


@entry
def compare_samples(last, sample, added, kept, newest, found):
    """x.y, x.x and y.y of the last sample x and another one y, both scaled to a largest magnitude of 1.

    Args:
        last: address of the last sample, bfloat16; 0 if there is none, which counts as zeros.
        sample: what it is compared with.
        added: what is added to the last sample for the next step; in units of its root mean square, unless nothing is
            kept.
        kept: the share of the last sample that is in the sum.
        newest: address of the sum in bfloat16, to be filled.
        found: to be filled, float32: also the mean square of `added`.
    """
    sample, added = plain_floats(sample), plain_floats(added)
    size = len(sample)
    mean_square = _f(_square(added, _f(1.0)) / size)
    unit = _f(math.sqrt(mean_square)) if kept > 0 and mean_square > 0 else _f(1.0)
    y_unit = max(_largest(sample), _SMALLEST)
    found[MEAN_SQUARE] = mean_square
    if last == 0:
        found[DOT], found[X_SQUARE] = _f(0.0), _f(0.0)
        found[Y_SQUARE] = _square(sample, y_unit)
        _to_bfloat16(added, unit, halves(newest, 0, size))
        return
    before = halves(last, 0, size)
    x_unit = max(_largest_of_halves(before), _SMALLEST)
    found[DOT], found[X_SQUARE], found[Y_SQUARE] = _products(before, sample, x_unit, y_unit)
    _add_to(before, _f(kept), added, unit, halves(newest, 0, size))


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
    dot, x_square, y_square = 0.0, 0.0, 0.0
    for i in range(len(sample)):
        x = as_float(_u(before[i]) << _u(16)) / x_unit
        y = sample[i] / y_unit
        dot += x * y
        x_square += x * x
        y_square += y * y
    return dot, x_square, y_square


@exact
def _bfloat16(x):
    """The bits of the nearest, of two the even one; NaN stays NaN."""
    bits = as_bits(x)
    nearest = _u(bits + _u(0x7FFF) + ((bits >> _u(16)) & _u(1))) >> _u(16)
    return numpy.uint16(nearest if x == x else _u(0x7FC0))


@exact
def _to_bfloat16(x, unit, out):
    for i in range(len(x)):
        out[i] = _bfloat16(_f(x[i] / unit))


@exact
def _add_to(before, kept, added, unit, out):
    for i in range(len(added)):
        x = as_float(_u(before[i]) << _u(16))
        out[i] = _bfloat16(_f(_f(x * kept) + added[i] / unit))


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


@inlined
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


@inlined
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


@inlined
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


@inlined
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
def follow(products, multiplier, confidence, length, rate, square, gain, pace, share, threshold, highest):
    """The multiplier of the next step, by how well the gradient agrees with the course.

    Args:
        products: from `compare_samples`.
        multiplier, confidence, length: the memory's.
        rate: the learning rate that the multiplier gave.
        square: the mean square of alignments.
        gain, pace, share: as of `controller.Pull`.
        threshold: confidence at which a step is an edge case.
        highest: the multiplier's bound, of steps of length 1.

    Returns:
        The multiplier, the alignment, the length and the mean square.
    """
    alignment = _cosine(products, _f(0.0))
    square += _f(share) * (alignment * alignment - square)
    paced = square > 0 and (alignment > 0 or rate > controller.PACED_DOWN_FROM)
    strength = max(pace / math.sqrt(square), gain) if paced else gain
    growth = math.exp(min(strength * alignment, controller.MOST_GROWTH))
    if confidence >= threshold:
        growth = min(growth, 1.0)
    newest = _f(math.sqrt(products[MEAN_SQUARE])) / rate
    known = newest > 0 and newest < math.inf
    ratio = length / newest if known and length > 0 else _f(1.0)
    newest = newest if known else length
    most = max(highest / newest, controller.FLOOR) if newest > 0 else math.inf
    return _f(min(max(multiplier * growth * ratio, controller.FLOOR), most)), alignment, newest, square

"""The three tests of `detection.py` on one window, in numpy, where each is a p-value."""

from __future__ import annotations

import math

import numpy

from .detection import DEVIATIONS_PER_MAD, FEWEST_COSINES, FEWEST_LOSSES, MAD_EFFICIENCY, RECENT_COSINES

_TINY = numpy.finfo(numpy.float32).tiny

# What is closer to 1 is 1 in float32: the p-value of a test that had too little to test.
_BELOW_ONE = 1 - 2.0**-25


def confidence(losses: numpy.ndarray, cosines: numpy.ndarray) -> float:
    """As `detection.confidence`, of (window,) float32."""
    known = losses[numpy.isfinite(losses)].astype(numpy.float64)
    p_values = spike(known) if math.isfinite(losses[-1]) else 1.0, rising(known), oscillating(cosines)
    p = [value for value in p_values if value < _BELOW_ONE]
    return math.exp(len(p) * math.log1p(-min(p))) if p else 0.0


def p_value(t: float, freedom: float) -> float:
    """As `detection.p_values`, of one test that has enough."""
    size = math.sqrt(freedom * math.log1p(t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return 0.5 * math.erfc(math.copysign(size, t) / math.sqrt(2))


def spike(losses: numpy.ndarray) -> float:
    """As `detection.spike`, of the losses that are known."""
    count = len(losses) - 1
    if count < FEWEST_LOSSES:
        return 1.0
    is_positive = losses.min() > 0
    values = numpy.log(numpy.maximum(losses, _TINY)) if is_positive else losses
    newest, others = float(values[-1]), values[:-1]
    median = _lower_median(others)
    spread = _lower_median(numpy.abs(others - median)) * DEVIATIONS_PER_MAD
    rounding = (max(abs(median), 1.0) if is_positive else abs(median)) * 1e-6 + 1e-12
    t = (newest - median) / max(spread * math.sqrt(1 + math.pi / 2 / count), rounding)
    return p_value(t, MAD_EFFICIENCY * count)


def rising(losses: numpy.ndarray) -> float:
    """As `detection.rising`, of the losses that are known."""
    count = len(losses)
    if count < FEWEST_LOSSES:
        return 1.0
    ordered = numpy.sort(losses)
    x = numpy.arange(1, count + 1) - (count + 1) / 2
    y = (ordered.searchsorted(losses) + ordered.searchsorted(losses, side="right") - count).astype(numpy.float64)
    r = float(x @ y) / max(math.sqrt(float(x @ x) * float(y @ y)), 1e-12)
    return p_value(r * math.sqrt((count - 2) / max(1 - r * r, 1e-7)), count - 2)


def oscillating(cosines: numpy.ndarray) -> float:
    """As `detection.oscillating`."""
    recent = [cosine for cosine in cosines[-RECENT_COSINES:].tolist() if not math.isnan(cosine)]
    count = len(recent)
    if count < FEWEST_COSINES:
        return 1.0
    mean = sum(recent) / count
    squares = sum((cosine - mean) * (cosine - mean) for cosine in recent)
    return p_value(-mean / max(math.sqrt(squares / (count - 1) / count), 1e-7), count - 1)


def _lower_median(values: numpy.ndarray) -> float:
    return float(numpy.sort(values)[(len(values) - 1) // 2])

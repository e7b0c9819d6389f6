"""The techniques on numbers: the formulas of `techniques/`, an element at a time, without arrays and loops.

`loops.py` applies several of them to a block in one pass over memory; the compiler puts them in place of their calls.
All numbers are float32.
"""

from __future__ import annotations

import numpy

from ....techniques import adabelief, tam
from ...measure import LARGEST_MAGNITUDE
from .jit import jit

_f = numpy.float32
_LARGEST_MAGNITUDE = _f(LARGEST_MAGNITUDE)
_TAM_DECAY = _f(tam.DECAY)
_LONGEST = _f(adabelief.LONGEST)


@jit
def usable(g):
    """The gradient element, or 0 if it is not finite or above 1e18."""
    return g if abs(g) <= _LARGEST_MAGNITUDE else _f(0.0)  # The comparison is false for NaN.


@jit
def regularized(g, total):
    """AGR: grad = g (1 - |g| / S)."""
    return g - g * (abs(g) / total)


@jit
def between(x, y, rate):
    """x + rate (y - x), from the nearer end, so that a rate of 1 gives y and not what rounding leaves of it."""
    return x + rate * (y - x) if rate < _f(0.5) else y - (_f(1.0) - rate) * (y - x)


@jit
def mean_square(average, x, rate, eps):
    """A running mean of squares: average + rate (eps - average) + rate x^2."""
    return between(average, eps, rate) + rate * x * x


@jit
def scaled(grad, exp_avg_sq, factor):
    """CAME: sg = factor grad / sqrt(exp_avg_sq)."""
    return factor * (grad / numpy.sqrt(exp_avg_sq))


@jit
def clipped(grad, bound):
    """In place of the scaling without CAME: sg = max(-bound, min(grad, bound))."""
    return max(-bound, min(grad, bound))


@jit
def averaged(exp_avg, drive, rate):
    """Consistency momentum: exp_avg = exp_avg + (1 - b1_t) (drive - exp_avg)."""
    return between(exp_avg, drive, rate)


@jit
def inconsistency(sg, exp_avg, drive, beta1):
    """The residual sg - bar, with bar = b1 exp_avg + (1 - b1) drive."""
    return (sg - drive) + beta1 * (drive - exp_avg)


@jit
def correlated(s, exp_avg, drive, norms):
    """Torque-aware momentum: s = 0.9 s + 0.1 (exp_avg drive) / norms, the product of the two column norms."""
    return s + (_f(1.0) - _TAM_DECAY) * (exp_avg * drive / norms - s)


@jit
def damped(exp_avg, s, drive, eps):
    """Torque-aware momentum: exp_avg = 0.9 exp_avg + ((1 + s) / 2 + eps) drive."""
    return _TAM_DECAY * exp_avg + (_f(0.5) * (_f(1.0) + s) + eps) * drive


@jit
def believed(exp_avg, exp_avg_res, correction):
    """AdaBelief: u = correction exp_avg / sqrt(exp_avg_res), from -10 to 10."""
    return max(-_LONGEST, min(correction * (exp_avg / numpy.sqrt(exp_avg_res)), _LONGEST))


@jit
def turned(u, sg, share):
    """Grams: u = share |u| sign(grad) + (1 - share) u; the scaled gradient has the gradient's sign."""
    towards = numpy.copysign(u, sg)
    towards = _f(0.0) if sg == _f(0.0) else towards
    return share * towards + (_f(1.0) - share) * u


@jit
def across(u, p, along, lengthening):
    """OrthoGrad: u = lengthening (u - along p)."""
    return lengthening * (u - along * p)


@jit
def agrees(u, sg):
    """Cautious: whether the update has the gradient's sign."""
    return u * numpy.copysign(_f(1.0), sg) > _f(0.0) and sg != _f(0.0)


@jit
def bumped(lr_mask, agrees_with_before, bump, low, high):
    """The learning-rate mask rises by the bump where the gradient has the sign of the step before, and else falls."""
    return min(max(lr_mask + (bump if agrees_with_before else -bump), low), high)

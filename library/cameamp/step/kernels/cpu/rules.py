"""The techniques on numbers: the formulas of `techniques/`, without arrays and loops.

`loops.py` applies several of them to a block in one pass over memory; the compiler puts them in place of their calls.
A number of a tensor is sixteen at once (`lanes.py`); those that all elements share are float32.
"""

from __future__ import annotations

import numpy

from ....techniques import adabelief, tam
from ...measure import LARGEST_MAGNITUDE
from .jit import within
from .lanes import both, choose, larger, magnitude, root, smaller, with_sign_of, zeros

_f = numpy.float32
_LARGEST_MAGNITUDE = _f(LARGEST_MAGNITUDE)
_TAM_DECAY = _f(tam.DECAY)
_LONGEST = _f(adabelief.LONGEST)


@within
def usable(g):
    """The gradient, or 0 if it is not finite or above 1e18."""
    return choose(magnitude(g) <= _LARGEST_MAGNITUDE, g, _f(0.0))  # The comparison is false for NaN.


@within
def regularized(g, share):
    """AGR: grad = g (1 - |g| / S), of 1 / S."""
    return g - g * (magnitude(g) * share)


@within
def between(x, y, rate):
    """x + rate (y - x), from the nearer end, so that a rate of 1 gives y and not what rounding leaves of it."""
    is_near = rate < _f(0.5)
    start = x if is_near else y
    return start + (rate if is_near else rate - _f(1.0)) * (y - x)


@within
def mean_square(average, x, rate, eps):
    """A running mean of squares: average + rate (eps - average) + rate x^2."""
    return between(average, zeros() + eps, rate) + rate * (x * x)


@within
def scaled(grad, exp_avg_sq, factor):
    """CAME: sg = factor grad / sqrt(exp_avg_sq)."""
    return factor * (grad / root(exp_avg_sq))


@within
def clipped(grad, bound):
    """In place of the scaling without CAME: sg = max(-bound, min(grad, bound))."""
    return larger(smaller(grad, bound), -bound)


@within
def averaged(exp_avg, drive, rate):
    """Consistency momentum: exp_avg = exp_avg + (1 - b1_t) (drive - exp_avg)."""
    return between(exp_avg, drive, rate)


@within
def inconsistency(sg, exp_avg, drive, beta1):
    """The residual sg - bar, with bar = b1 exp_avg + (1 - b1) drive."""
    return (sg - drive) + beta1 * (drive - exp_avg)


@within
def correlated(s, exp_avg, drive, norms):
    """Torque-aware momentum: s = 0.9 s + 0.1 (exp_avg drive) / norms, the product of the two column norms."""
    return s + (_f(1.0) - _TAM_DECAY) * (exp_avg * drive / norms - s)


@within
def damped(exp_avg, s, drive, eps):
    """Torque-aware momentum: exp_avg = 0.9 exp_avg + ((1 + s) / 2 + eps) drive."""
    return _TAM_DECAY * exp_avg + (_f(0.5) * (_f(1.0) + s) + eps) * drive


@within
def believed(exp_avg, exp_avg_res, correction):
    """AdaBelief: u = correction exp_avg / sqrt(exp_avg_res), from -10 to 10."""
    return clipped(correction * (exp_avg / root(exp_avg_res)), _LONGEST)


@within
def turned(u, sg, share):
    """Grams: u = share |u| sign(grad) + (1 - share) u; the scaled gradient has the gradient's sign."""
    towards = choose(magnitude(sg) > _f(0.0), with_sign_of(u, sg), _f(0.0))
    return share * towards + (_f(1.0) - share) * u


@within
def across(u, p, along, lengthening):
    """OrthoGrad: u = lengthening (u - along p)."""
    return lengthening * (u - along * p)


@within
def agrees(u, sg):
    """Cautious: whether the update has the gradient's sign."""
    return both(u * with_sign_of(_f(1.0), sg) > _f(0.0), magnitude(sg) > _f(0.0))


@within
def bumped(lr_mask, agrees_with_before, bump, low, high):
    """The learning-rate mask rises by the bump where the gradient has the sign of the step before, and else falls."""
    return smaller(larger(lr_mask + choose(agrees_with_before, bump, -bump), low), high)

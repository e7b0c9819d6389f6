"""The rules on one block of a tensor, each function one loop, in as few passes over memory as the sums allow.

What is updated in place is named first; a block of a state that is coded is decoded before and encoded after. An array
is never given twice: where two may overlap, the compiler's loop takes one element at a time.
"""

from __future__ import annotations

import numpy

from . import eights, rules
from .jit import jit

_f = numpy.float32
_d = numpy.float64

# From so many columns on, a row is long enough for a loop of its own.
_WIDE = 64

# The first pass over gradients ----------------------------------------------------------------------------------


@jit
def measure(g):
    """The sum of |g|, how many elements are not 0, and how many are not usable."""
    total, nonzero, unusable = _f(0.0), 0, 0
    for i in range(len(g)):
        x = rules.usable(g[i])
        total += abs(x)
        nonzero += x != _f(0.0)
        unusable += not abs(g[i]) <= rules._LARGEST_MAGNITUDE
    return total, nonzero, unusable


@jit
def squared_deviations(g, mean):
    """The sum of (|g| - mean)^2."""
    total = _f(0.0)
    for i in range(len(g)):
        deviation = abs(rules.usable(g[i])) - mean
        total += deviation * deviation
    return total


# The scaled gradient --------------------------------------------------------------------------------------------


@jit
def sum_scaled(g, exp_avg_sq, total, rate, eps):
    """The sum of squares of the gradient over the root of its new second moment."""
    result = _f(0.0)
    for i in range(len(g)):
        grad = rules.regularized(rules.usable(g[i]), total)
        sg = rules.scaled(grad, rules.mean_square(exp_avg_sq[i], grad, rate, eps), _f(1.0))
        result += sg * sg
    return result


@jit
def scaled_gradient(g, exp_avg_sq, total, rate, eps, factor, sg):
    """The scaled gradient; the second moment stays as it is."""
    for i in range(len(g)):
        grad = rules.regularized(rules.usable(g[i]), total)
        sg[i] = rules.scaled(grad, rules.mean_square(exp_avg_sq[i], grad, rate, eps), factor)


@jit
def scale_gradient(exp_avg_sq, g, total, rate, eps, factor, sg):
    """Update the second moment; the scaled gradient."""
    for i in range(len(g)):
        grad = rules.regularized(rules.usable(g[i]), total)
        exp_avg_sq[i] = rules.mean_square(exp_avg_sq[i], grad, rate, eps)
        sg[i] = rules.scaled(grad, exp_avg_sq[i], factor)


@jit
def clipped_gradient(g, total, bound, sg):
    """The scaled gradient without CAME."""
    for i in range(len(g)):
        sg[i] = rules.clipped(rules.regularized(rules.usable(g[i]), total), bound)


# The update, up to Grams ----------------------------------------------------------------------------------------


@jit
def late_update(exp_avg, exp_avg_res, sg, drive, rate, beta1, rate3, eps, correction, share, u):
    """Consistency momentum, AdaBelief and Grams."""
    for i in range(len(sg)):
        exp_avg[i] = rules.averaged(exp_avg[i], drive[i], rate)
        residual = rules.inconsistency(sg[i], exp_avg[i], drive[i], beta1)
        exp_avg_res[i] = rules.mean_square(exp_avg_res[i], residual, rate3, eps)
        u[i] = rules.turned(rules.believed(exp_avg[i], exp_avg_res[i], correction), sg[i], share)


@jit
def late_update_alone(exp_avg, exp_avg_res, sg, drive, rate, beta1, rate3, eps, correction, share, u):
    """The same update; no state changes."""
    for i in range(len(sg)):
        m = rules.averaged(exp_avg[i], drive[i], rate)
        residual = rules.inconsistency(sg[i], m, drive[i], beta1)
        res = rules.mean_square(exp_avg_res[i], residual, rate3, eps)
        u[i] = rules.turned(rules.believed(m, res, correction), sg[i], share)


@jit
def early_update(s, exp_avg, exp_avg_res, sg, drive, norms, eps1, rate3, eps2, correction, share, u):
    """Torque-aware momentum, AdaBelief and Grams; `norms` is of each element's column."""
    for i in range(len(sg)):
        s[i] = rules.correlated(s[i], exp_avg[i], drive[i], norms[i])
        exp_avg[i] = rules.damped(exp_avg[i], s[i], drive[i], eps1)
        exp_avg_res[i] = rules.mean_square(exp_avg_res[i], sg[i] - exp_avg[i], rate3, eps2)
        u[i] = rules.turned(rules.believed(exp_avg[i], exp_avg_res[i], correction), sg[i], share)


@jit
def early_update_alone(s, exp_avg, exp_avg_res, sg, drive, norms, eps1, rate3, eps2, correction, share, u):
    """The same update; no state changes."""
    for i in range(len(sg)):
        m = rules.damped(exp_avg[i], rules.correlated(s[i], exp_avg[i], drive[i], norms[i]), drive[i], eps1)
        res = rules.mean_square(exp_avg_res[i], sg[i] - m, rate3, eps2)
        u[i] = rules.turned(rules.believed(m, res, correction), sg[i], share)


# What depends on a whole tensor ---------------------------------------------------------------------------------


@jit
def products(u, p):
    """u.p, p.p and u.u, in float64: weights may be so small that their squares are 0 in float32."""
    up, pp, uu = 0.0, 0.0, 0.0
    for i in range(len(u)):
        up += _d(u[i]) * _d(p[i])
        pp += _d(p[i]) * _d(p[i])
        uu += _d(u[i]) * _d(u[i])
    return up, pp, uu


@jit
def count_agreement(u, sg, p, along, lengthening):
    """How many elements of the update, without its part along the weights, agree in sign with the gradient."""
    count = 0
    for i in range(len(u)):
        count += rules.agrees(rules.across(u[i], p[i], along, lengthening), sg[i])
    return count


@jit
def add_squares(x, out):
    """out = out + x^2."""
    for i in range(len(x)):
        out[i] += x[i] * x[i]


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


# The learning-rate mask and the weights -------------------------------------------------------------------------


@jit
def polarity(g, total, out):
    """Whether the gradient is above 0."""
    for i in range(len(g)):
        out[i] = rules.regularized(rules.usable(g[i]), total) > _f(0.0)


@jit
def bump(lr_mask, now, before, amount, low, high):
    """Adjust the mask by the signs of this step and the one before."""
    for i in range(len(lr_mask)):
        lr_mask[i] = rules.bumped(lr_mask[i], now[i] == before[i], amount, low, high)


@jit
def step_weights(p, u, lr_mask, scaling, along, lengthening, decay, multiplier, change):
    """OrthoGrad, weight decay, and the step itself; `change` is what is taken off the weights."""
    for i in range(len(u)):
        update = rules.across(u[i], p[i], along, lengthening) + decay * p[i]
        change[i] = lr_mask[i] * multiplier * scaling[i] * update
        p[i] -= change[i]


@jit
def mask_disagreement(u, sg, p, along, lengthening, factor):
    """OrthoGrad, then Cautious: factor u where it agrees with the gradient, else 0."""
    for i in range(len(u)):
        update = rules.across(u[i], p[i], along, lengthening)
        u[i] = factor * update if rules.agrees(update, sg[i]) else _f(0.0)


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
def sample(x, start, every, out):
    """Every n-th element of a tensor, of which x is the part from `start` on."""
    for place in range(-(-start // every), -(-(start + len(x)) // every)):
        out[place] = x[place * every - start]


@jit
def sample_gradient(g, start, every, out):
    """The same of a gradient, whose unusable elements are 0."""
    for place in range(-(-start // every), -(-(start + len(g)) // every)):
        out[place] = rules.usable(g[place * every - start])

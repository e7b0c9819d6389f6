"""Two samples compared and added in a numba kernel: numpy would take longer to make room for what lies in between."""

from __future__ import annotations

import math

import numpy

from ..step.kernels.cpu.codes import largest
from ..step.kernels.cpu.jit import as_bits, as_float, entry, exact, halves, jit, plain_floats

_f = numpy.float32
_u = numpy.uint32
_SMALLEST = _f(1e-30)


@entry
def compare_samples(last, sample, added, kept, newest, found):
    """x.y, x.x and y.y of the last sample x and another one y, both scaled to a largest magnitude of 1.

    Args:
        last: address of the last sample, bfloat16; 0 if there is none, which counts as zeros.
        sample: what it is compared with, (n,) float32, as are all others.
        added: what is added to the last sample for the next step; in units of its root mean square, unless nothing is
            kept.
        kept: the share of the last sample that is in the sum.
        newest: address of the sum in bfloat16, to be filled.
        found: (4,) float64, to be filled with the three products and the mean square of `added`.
    """
    sample, added = plain_floats(sample), plain_floats(added)
    size = len(sample)
    mean_square = _square(added, _f(1.0)) / size
    scale = _f(1.0 / math.sqrt(mean_square)) if kept > 0 and mean_square > 0 else _f(1.0)
    y_scale = _scale_of(largest(sample))
    found[3] = mean_square
    if last == 0:
        found[0], found[1], found[2] = 0.0, 0.0, _square(sample, y_scale)
        _to_bfloat16(added, scale, halves(newest, 0, size))
        return
    before = halves(last, 0, size)
    x_scale = _scale_of(_largest_of_halves(before))
    found[0], found[1], found[2] = _products(before, sample, x_scale, y_scale)
    _add_to(before, _f(kept), added, scale, halves(newest, 0, size))


@exact
def _scale_of(magnitude):
    return _f(1.0) / max(magnitude, _SMALLEST)


@exact
def _largest_of_halves(x):
    bits = _u(0)
    for i in range(len(x)):
        bits = max(bits, _u(_u(x[i]) & _u(0x7FFF)))
    return as_float(_u(bits << _u(16)))


@jit
def _square(y, scale):
    total = 0.0
    for i in range(len(y)):
        total += (y[i] * scale) * (y[i] * scale)
    return total


@jit
def _products(before, sample, x_scale, y_scale):
    dot, x_square, y_square = 0.0, 0.0, 0.0
    for i in range(len(sample)):
        x = as_float(_u(before[i]) << _u(16)) * x_scale
        y = sample[i] * y_scale
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
def _to_bfloat16(x, scale, out):
    for i in range(len(x)):
        out[i] = _bfloat16(_f(x[i] * scale))


@exact
def _add_to(before, kept, added, scale, out):
    for i in range(len(added)):
        x = as_float(_u(before[i]) << _u(16))
        out[i] = _bfloat16(_f(_f(x * kept) + _f(added[i] * scale)))

"""Stochastic rounding, and the reproducible noise behind it.

A weight in bfloat16 has 8 bits: a step of less than a 256th of it would round away every time. Rounding up or down at
random, in proportion to the distance, keeps the step on average. The noise is a hash of the step, the parameter's
position and the element, so that a resumed run draws the same and the global generators are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of the significand, the implicit one included, and the exponent below which the dtype's steps stop shrinking.
_FORMATS = {torch.bfloat16: (8, -125), torch.float16: (11, -13)}

# Steps of the noise; finer than what float32 keeps beyond the 8 or 11 bits of the significand.
_NOISE_BITS = 13


def stochastic_round(x: Tensor, dtype: torch.dtype, positions: Tensor, step: int) -> Tensor:
    """Round float32 to a 16-bit dtype, up or down with the probabilities that keep the mean.

    Args:
        x: values, (tensors, rows, columns) float32.
        dtype: torch.bfloat16 or torch.float16.
        positions: int32 number of each tensor, (tensors,), that tells its noise from its neighbours'.
        step: number of the step, likewise.

    Returns:
        `x` in `dtype`: exactly `x` where it is representable, finite where `x` is.
    """
    bits, smallest_exponent = _FORMATS[dtype]
    exponent = torch.frexp(x).exponent.clamp_min_(smallest_exponent).sub_(bits)
    # In units of the last place x has `bits` bits before the point; adding noise below 1 and cutting there is exact.
    units = torch.ldexp(x, -exponent).add_(uniform_noise(x.shape, positions, step)).floor_()
    rounded = torch.ldexp(units, exponent)
    largest = torch.finfo(dtype).max
    return rounded.clamp_(-largest, largest).to(dtype)


def uniform_noise(shape: torch.Size, positions: Tensor, step: int) -> Tensor:
    """Noise in [0, 1), a pure function of (step, position, element).

    Args:
        shape: (tensors, rows, columns).
        positions: int32, (tensors,); its device is the result's.
        step: number of the step.

    Returns:
        float32 multiples of 2^-13.
    """
    elements = torch.arange(shape.numel() // shape[0], dtype=torch.int32, device=positions.device)
    streams = _mix(positions + _wrapped(step * 0x9E3779B1))
    hashed = _mix(streams.unsqueeze(1) + elements)
    return hashed.bitwise_and_((1 << _NOISE_BITS) - 1).to(torch.float32).mul_(2.0**-_NOISE_BITS).view(shape)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with little bias (the lowbias32 constants of C. Wellons); overwrites x."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(_logical_shift(x, shift)).mul_(_wrapped(factor))
    return x.bitwise_xor_(_logical_shift(x, 16))


def _logical_shift(x: Tensor, shift: int) -> Tensor:
    return (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _wrapped(value: int) -> int:
    """`value` as the 32-bit signed integer with the same low bits."""
    return (value + 2**31) % 2**32 - 2**31

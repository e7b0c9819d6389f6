"""Stochastic rounding, and the reproducible noise behind it.

A weight in bfloat16 has 8 bits: a step of less than a 256th of it would round away every time. Rounding up or down at
random, in proportion to the distance, keeps the step on average. The noise is a hash of the step, the parameter's
position and the element, so that a resumed run draws the same and the global generators are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

# Bits of the significand, the implicit one included, and the exponent below which steps stop shrinking. float16's do
# there; bfloat16's go down to 2^-133, but a power of two beyond 2^126 or below 2^-126 overflows, or becomes 0, in some
# versions and settings of PyTorch.
_FORMATS = {torch.bfloat16: (8, -118), torch.float16: (11, -13)}

# Steps of the noise; finer than what float32 keeps beyond the 8 or 11 bits of the significand.
_NOISE_BITS = 13


# Elements whose noise is made at a time; the integers behind it take several times its memory.
_PART = 4 * 1024 * 1024


class Dither(NamedTuple):
    """Noise for one stack at one step.

    Attributes:
        positions: int32 number of each tensor, (tensors,), that tells its noise from its neighbours'.
        step: number of the step, likewise.
        first: the number of the stack's first element in each whole tensor, of which a shard is a part.
    """

    positions: Tensor
    step: int
    first: int = 0

    @property
    def device(self) -> torch.device:
        """Where the noise is made."""
        return self.positions.device

    def in_parts(self, x: Tensor) -> tuple[tuple[Tensor, ...], list[Callable[[], Tensor]]]:
        """Cut a (tensors, elements) stack into parts of moderate size.

        Returns:
            The parts, which are views, and for each a function that makes its noise in [0, 1), of its shape.
        """
        parts = x.split(max(1, _PART // len(x)), dim=1)
        starts = [self.first + sum(part.shape[1] for part in parts[:index]) for index in range(len(parts))]
        return parts, [partial(uniform_noise, self, start, part.shape[1]) for start, part in zip(starts, parts)]


def stochastic_round(x: Tensor, dtype: torch.dtype, dither: Dither) -> Tensor:
    """Round float32 to a 16-bit dtype, up or down with the probabilities that keep the mean.

    Args:
        x: values, (tensors, rows, columns) float32.
        dtype: torch.bfloat16 or torch.float16.
        dither: the noise that decides.

    Returns:
        `x` in `dtype`: exactly `x` where it is representable (in bfloat16, as a multiple of 2^-126), finite where `x`
        is.
    """
    rounded = torch.empty(x.shape, dtype=dtype, device=x.device)
    parts, noises = dither.in_parts(x.flatten(1))
    for part, noise, out in zip(parts, noises, dither.in_parts(rounded.flatten(1))[0]):
        out.copy_(_round_with(part, dtype, noise()))
    return rounded


def _round_with(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """`x` rounded to what `dtype` can hold; still float32."""
    bits, smallest_exponent = _FORMATS[dtype]
    exponent = torch.frexp(x).exponent.clamp_min_(smallest_exponent).sub_(bits)
    # 2^exponent by its bits: older versions of torch.ldexp make it in the default dtype, which may be float16.
    last_place = ((exponent + 127) << 23).view(torch.float32)
    # In units of the last place x has `bits` bits before the point; adding noise below 1 and cutting there is exact.
    rounded = (x / last_place).add_(noise).floor_().mul_(last_place)
    largest = torch.finfo(dtype).max
    return rounded.clamp_(-largest, largest)


def uniform_noise(dither: Dither, start: int, count: int) -> Tensor:
    """Noise in [0, 1), a pure function of (step, position, element).

    Args:
        dither: step and positions.
        start: the first element.
        count: how many.

    Returns:
        (tensors, count) float32 multiples of 2^-13.
    """
    elements = torch.arange(start, start + count, dtype=torch.int32, device=dither.device)
    streams = _mix(dither.positions + _wrapped(dither.step * 0x9E3779B1))
    hashed = _mix(streams.unsqueeze(1) + elements)
    return hashed.bitwise_and_((1 << _NOISE_BITS) - 1).to(torch.float32).mul_(2.0**-_NOISE_BITS)


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

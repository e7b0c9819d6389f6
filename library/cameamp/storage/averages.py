"""Several running averages of one stack, stored together in a few bits an element, and their weighted mean.

The weights in the mean fall with the period at which an average is updated, so the bytes go to the shortest period:
four bits an element. The others share what is left as matrices of low rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..rounding import Dither
from . import AverageFormat, StoredAverage, low_rank, matrix_shape
from .low_rank import LowRank, StoredLowRank
from .low_rank_shards import MOST_TOGETHER
from .nibbles import Nibbles

# Per average; fewer than four share the bytes of four. Four take 5 % of the sixteen bytes of the other states. The
# smallest parameters take up to 0.94 bytes for four.
_BYTES_AN_ELEMENT = 0.195
_LARGEST_RANK = 4
# With them a right factor takes half a percent of the bytes of all states in 8 bits, in matrices that are this low.
_ENOUGH_ROWS = 256


@cache
def average_formats(periods: tuple[int, ...], shape: torch.Size, sharded: bool = False) -> dict[int, AverageFormat]:
    """How each of several averages of a parameter is stored.

    Args:
        periods: every how many steps each of them is updated.
        shape: the parameter's.
        sharded: whether processes share its rows: those of low rank are then cut or merged, and no square is made.

    Returns:
        {period: format}.
    """
    rows, columns = matrix_shape(shape)
    count = rows * columns
    left = int(_BYTES_AN_ELEMENT * max(4, len(periods)) * count)
    formats: dict[int, AverageFormat] = {}
    by_weight = sorted(periods)
    nibbles = -(-count // 2) + 4
    smallest = LowRank(*_fold(rows, columns, 0, sharded), 1).bytes(shape)
    # The shortest period has four bits in any case, which is more than the bytes of fewer than 576 elements.
    while by_weight and (not formats or left - nibbles >= (len(by_weight) - 1) * smallest):
        formats[by_weight.pop(0)] = Nibbles()
        left -= nibbles
    if by_weight:
        folded = _fold(rows, columns, left // len(by_weight), sharded)
        one = LowRank(*folded, 1).bytes(shape)
        for place, period in enumerate(by_weight):
            rank = -(-(left // one - place) // len(by_weight))  # what is over goes to the first
            factors = LowRank(*_taller(*folded), max(1, min(rank, _LARGEST_RANK, *folded)))
            # Of a few elements, such as a row of them, the factors take no less than they themselves.
            formats[period] = factors if factors.bytes(shape) < nibbles else Nibbles()
    return formats


def _fold(rows: int, columns: int, limit: int, sharded: bool) -> tuple[int, int]:
    """A matrix's elements, in their order, as one that is so near to a square that rank 1 takes at most `limit` bytes.

    Its own shape if that fits; else as many rows merged, or cut, as it takes. If no number that divides them is enough,
    a square with some zeros added. Shards are cut between rows: of theirs, as many are merged as it takes all the same,
    or as take the fewest bytes.
    """
    long, short = max(rows, columns), min(rows, columns)
    most = isqrt(long // short)
    factors: Sequence[int] = [factor for factor in range(1, most + 1) if long % factor == 0]
    if sharded and rows >= columns:
        # Those that divide the rows first: shards then mostly begin with a whole group.
        factors = sorted(range(1, min(most, MOST_TOGETHER) + 1), key=lambda factor: long % factor > 0)
    every = [
        (-(-rows // factor), columns * factor) if rows >= columns else (rows * factor, columns // factor)
        for factor in factors
    ]
    for folded in every:
        if _bytes_of_rank_1(*folded) <= limit:
            return folded
    if sharded:
        return min(every, key=sum)
    side = isqrt(rows * columns - 1) + 1
    return side, side


def _taller(rows: int, columns: int) -> tuple[int, int]:
    """A matrix with its rows cut until there are `_ENOUGH_ROWS`, or the factors would take no fewer bytes for it.

    Every process that has some of the rows has all of the right factor, which should be short for that.
    """
    found = rows, columns
    for parts in range(2, columns + 1):
        cut = rows * parts, columns // parts
        if found[0] >= _ENOUGH_ROWS or sum(cut) >= rows + columns:
            break
        if columns % parts == 0:
            found = cut
    return found


def _bytes_of_rank_1(rows: int, columns: int) -> int:
    return LowRank(rows, columns, 1).bytes(torch.Size((rows, columns)))


class Update(NamedTuple):
    """What is done to one average.

    Attributes:
        average: the average.
        rate: how far it goes towards the target; 0 for not at all.
        share: what it is multiplied by in the weighted mean.
    """

    average: StoredAverage
    rate: float
    share: float


def lerp_and_sum(
    updates: Sequence[Update], target: Tensor, dither: Dither, out: Tensor, scratch: Tensor | None = None
) -> None:
    """Update some averages, and put the sum of share * average into `out`.

    Args:
        updates: the averages.
        target: what they go towards, (tensors, rows, columns); left as it is.
        dither: what rounding depends on.
        out: memory for the sum, of target's shape; overwritten.
        scratch: memory to compute in, likewise; allocated if it is None.
    """
    out_share = 0.0  # What the sum still has to be multiplied by: that is done when the packed averages are added.
    packed: list[tuple[StoredAverage, float]] = []
    for average, rate, share in updates:
        unpacked = average.lerp(target, rate, dither, out if out_share == 0 else None, scratch) if rate != 0 else None
        if unpacked is None:
            packed.append((average, share))
        elif out_share == 0:
            out_share = share * unpacked.factor
        else:
            out.add_(unpacked.stack, alpha=share * unpacked.factor / out_share)
        del unpacked
    if out_share == 0:
        out.zero_()
    _add_packed(out, out_share or 1.0, packed, scratch)


def _add_packed(
    out: Tensor, out_share: float, packed: Sequence[tuple[StoredAverage, float]], scratch: Tensor | None
) -> None:
    """out_share * out + the sum of share * average, in `out`; those of low rank all at once."""
    in_factors: list[tuple[StoredLowRank, float]] = []
    for average, share in packed:
        if isinstance(average, StoredLowRank):
            in_factors.append((average, share))
        else:
            out.mul_(out_share).add_(average.read(scratch), alpha=share)
            out_share = 1.0
    if in_factors:
        low_rank.add_to(out, out_share, in_factors)
    elif out_share != 1:
        out.mul_(out_share)

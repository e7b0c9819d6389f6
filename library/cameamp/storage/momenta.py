"""How the multi-scale momenta of a parameter are kept: all of them in a few bits an element.

Their weights in the mean fall with their periods, so the bytes go to the shortest: four bits an element. The others
share what is left as matrices of low rank. Small parameters keep float32 momenta: there is nothing to save.
"""

from __future__ import annotations

from functools import cache
from math import isqrt

import torch

from . import MovingStorage, matrix_shape
from .full import Full
from .low_rank import LowRank
from .nibbles import Nibbles

# Smaller parameters keep 32-bit states.
SMALLEST_CODED = 4096

# For each momentum, counted as four where there are fewer. With four, 5 % of the sixteen bytes of the other states.
_BYTES_AN_ELEMENT = 0.195
_LARGEST_RANK = 4

_FULL = Full()


@cache
def momentum_storages(periods: tuple[int, ...], shape: torch.Size) -> dict[int, MovingStorage]:
    """How each momentum of a parameter is kept.

    Args:
        periods: the update periods of all of them.
        shape: the parameter's.

    Returns:
        {period: storage}.
    """
    rows, columns = matrix_shape(shape)
    count = rows * columns
    if count < SMALLEST_CODED:
        return dict.fromkeys(periods, _FULL)
    left = int(_BYTES_AN_ELEMENT * max(4, len(periods)) * count)
    storages: dict[int, MovingStorage] = {}
    by_weight = sorted(periods)
    nibbles = -(-count // 2) + 4
    smallest = LowRank(*_fold(rows, columns, 0), 1).bytes()
    while by_weight and left - nibbles >= (len(by_weight) - 1) * smallest:
        storages[by_weight.pop(0)] = Nibbles()
        left -= nibbles
    if by_weight:
        folded = _fold(rows, columns, left // len(by_weight))
        one = LowRank(*folded, 1).bytes()
        for place, period in enumerate(by_weight):
            rank = -(-(left // one - place) // len(by_weight))  # what is over goes to the first
            storages[period] = LowRank(*folded, max(1, min(rank, _LARGEST_RANK, *folded)))
    return storages


def _fold(rows: int, columns: int, limit: int) -> tuple[int, int]:
    """A matrix's elements, in their order, as one that is so near to a square that rank 1 takes at most `limit` bytes.

    Its own shape where that fits; else as many rows merged, or cut, as it takes; else a square with some zeros added.
    """
    long, short = max(rows, columns), min(rows, columns)
    for factor in range(1, isqrt(long // short) + 1):
        if long % factor == 0 and LowRank(long // factor, short * factor, 1).bytes() <= limit:
            return (long // factor, short * factor) if rows >= columns else (short * factor, long // factor)
    side = isqrt(rows * columns - 1) + 1
    return side, side

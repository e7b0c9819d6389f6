"""Whether a device can store a state in some formats, found out by trying."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from ..rounding import Dither
from . import Format
from .blockwise import SMALLEST_BLOCK, Blockwise
from .low_rank import LowRank


def can_store(formats: Collection[Format], device: torch.device, error: RuntimeError) -> bool:
    """Whether formats that failed with an error work on a device after all, so that the error has another reason.

    A missing kernel says so by its type, and so does a GPU that is out of memory. After any other error, as of a CPU
    that is out of memory, the smallest state of each kind is tried.
    """
    if isinstance(error, NotImplementedError):
        return False
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    dither = Dither(torch.zeros(1, dtype=torch.int32, device=device), 1)
    try:
        for each in formats:
            stored = _smallest(each).new(1, torch.Size((SMALLEST_BLOCK, SMALLEST_BLOCK)), device)
            stored.write(stored.read(), dither)
    except RuntimeError:
        return False
    return True


def _smallest(code: Format) -> Format:
    """A format of the same kind for 64 x 64 elements."""
    if isinstance(code, Blockwise):
        return replace(code, block=SMALLEST_BLOCK)
    if isinstance(code, LowRank):
        return LowRank(SMALLEST_BLOCK, SMALLEST_BLOCK, 1)
    return code

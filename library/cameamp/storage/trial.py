"""Whether a device can store a state in some formats, found out by trying."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..rounding import Dither
from . import Format

# Float32 copies of a state that coding it may take.
_COPIES = 4


def can_store(formats: Collection[Format], shape: torch.Size, device: torch.device, error: RuntimeError) -> bool:
    """Whether formats that failed with an error work on a device after all, so that the error has another reason.

    A missing kernel says so by its type, and so does a GPU that is out of memory. After any other error, as of a CPU
    that is out of memory, it is tried: whether there is memory, and then to store zeros.

    Args:
        formats: the formats.
        shape: the parameter's.
        device: the device.
        error: what storing a state raised.
    """
    if isinstance(error, NotImplementedError):
        return False
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    dither = Dither(torch.zeros(1, dtype=torch.int32, device=device), 1)
    try:
        torch.empty(_COPIES, shape.numel(), dtype=torch.float32, device=device)
    except RuntimeError:
        return True
    try:
        for each in formats:
            stored = each.new(1, shape, device)
            stored.write(stored.read(), dither)
    except RuntimeError:
        return False
    return True

"""Where tensors are: no device is waited for, and no autocast of its changes our arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for it; a copy to the CPU is waited for, or it would be read too early."""
    return x if x.device == device else x.to(device, non_blocking=device.type != "cpu")


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Around products of matrices on a device: autocast, in which a training loop may call them, leaves them alone."""
    kind = device.type
    autocasts = _can_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocasts else nullcontext()


@cache
def _can_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)

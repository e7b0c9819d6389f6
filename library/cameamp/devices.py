"""Devices: transfers that do not wait for them, and arithmetic that autocast does not change."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Only a transfer to the CPU is waited for, or the tensor would be read too early."""
    return x if x.device == device else x.to(device, non_blocking=device.type != "cpu")


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context in which matrix products on a device are not autocast, even if the training loop uses autocast."""
    kind = device.type
    autocasts = _can_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocasts else nullcontext()


@cache
def _can_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)

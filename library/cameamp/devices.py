"""Where tensors are, and what surrounds a step: no device is waited for, no mode changes its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for it; a copy to the CPU is waited for, or it would be read too early."""
    return x.to(device, non_blocking=device.type != "cpu")


@contextmanager
def full_precision(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Around arithmetic on some tensors: autocast, in which a training loop may call it, leaves it alone."""
    with ExitStack() as stack:
        for kind in {x.device.type for x in tensors}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

"""Checksums of a checkpoint: what it was saved with, so that damage is seen before it trains on.

torch checks none when it loads a file. A tensor's checksum is a weighted sum of its elements' bit patterns modulo 2^64.
That is exact in any order of adding, so it is the same on every device and for any layout in memory, and it is computed
where the states are: nothing but one number a tensor crosses to the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The integers whose bits an element of so many bytes is read as.
_PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Elements that are weighted at a time; each takes 16 bytes meanwhile.
_PART = 1024 * 1024

# What a sum is made of, by state key; None where the value is not a tensor.
Sums = Mapping[str, int]


def tensor_sums(stack: Tensor) -> Tensor:
    """The checksum of each tensor of a stack.

    Element i has the weight 2 i + 1. Weights are odd, so no change of a single element is lost; two elements that
    trade places change the sum by the product of their differences, which 2^64 never divides.

    Args:
        stack: (tensors, ...) of any dtype but complex.

    Returns:
        (tensors,) int64, on the stack's device.
    """
    patterns = stack.reshape(len(stack), -1).contiguous().view(_PATTERNS[stack.element_size()])
    sums = torch.zeros(len(stack), dtype=torch.int64, device=stack.device)
    length = max(1, _PART // max(1, len(stack)))
    for start in range(0, patterns.shape[1], length):
        part = patterns[:, start : start + length].to(torch.int64)
        weights = torch.arange(start, start + part.shape[1], device=stack.device).mul_(2).add_(1)
        sums += (part * weights).sum(dim=1)  # Not in place: int64 is not copied.
    return sums


def checksum(value: Any, sums: Sums | None = None) -> int:
    """The checksum of what a checkpoint holds: a state of a parameter, or the options of a group.

    Args:
        value: tensors, numbers, strings, lists and dictionaries of them.
        sums: for a dictionary, what `tensor_sums` gave for its tensors, where known.

    Returns:
        A whole number from 0 to 2^63 - 1: torch.distributed.checkpoint carries it wherever it carries a step.
    """
    text = repr(_plain(value, sums or {}))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _plain(value: Any, sums: Sums) -> Any:
    """`value` with a tensor as its dtype, shape and sum; the same for a list and a tuple, and for any order of keys."""
    if isinstance(value, Tensor):
        return _plain_tensor(value, int(tensor_sums(value.detach().unsqueeze(0)).item()))
    if isinstance(value, Mapping):
        return [
            (str(key), _plain_tensor(value[key], sums[key]) if key in sums else _plain(value[key], {}))
            for key in sorted(value, key=str)
        ]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item, {}) for item in value]
    return value


def _plain_tensor(value: Tensor, total: int) -> tuple[str, list[int], int]:
    return str(value.dtype), list(value.shape), total

"""Checksums that are saved in a checkpoint, so that damage is noticed before training continues from it.

torch itself checks nothing when it loads a file. The checksum of a tensor is a weighted sum of the bit patterns of its
elements, modulo 2^64. This sum is exact in any order of adding, so it is the same on every device and for every layout
in memory. It is computed on the device of the states; only one number per tensor is transferred to the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The integer type that the bits of an element are read as, by the size of the element in bytes.
_PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# How many elements are weighted at a time. Each needs 16 bytes of temporary memory.
_PART = 1024 * 1024

# Tensor sums by the key of the state.
Sums = Mapping[str, int]


def tensor_sums(stack: Tensor, first: int = 0) -> Tensor:
    """The checksum of each tensor of a stack.

    Element i has the weight 2 i + 1. Weights are odd, so every change of a single element changes the sum. Swapping two
    elements changes it by the difference of their weights times that of their values, which 2^64 never divides.

    Args:
        stack: (tensors, ...), of any dtype that is not complex.
        first: the number of the first element; the sums of the parts of a tensor add up to its own.

    Returns:
        (tensors,) int64, on the stack's device.
    """
    patterns = stack.reshape(len(stack), stack[0].numel()).contiguous().view(_PATTERNS[stack.element_size()])
    sums = torch.zeros(len(stack), dtype=torch.int64, device=stack.device)
    length = max(1, _PART // max(1, len(stack)))
    for start in range(0, patterns.shape[1], length):
        part = patterns[:, start : start + length].to(torch.int64)
        weights = torch.arange(first + start, first + start + part.shape[1], device=stack.device).mul_(2).add_(1)
        sums += (part * weights).sum(dim=1)  # Not in place: int64 is not copied.
    return sums


def checksum(value: Any, sums: Sums | None = None) -> int:
    """The checksum of a part of a checkpoint: the state of a parameter, or the options of a group.

    Args:
        value: tensors, numbers, strings, lists and dictionaries of them.
        sums: if `value` is a dictionary, the results of `tensor_sums` for its tensors, as far as they are known.

    Returns:
        A whole number from 0 to 2^63 - 1. torch.distributed.checkpoint handles it in the same way as a step.
    """
    text = repr(_plain(value, sums or {}))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _plain(value: Any, sums: Sums) -> Any:
    """`value` with each tensor replaced by its dtype, shape and sum.

    The result is the same for a list and a tuple, and for any order of keys.
    """
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

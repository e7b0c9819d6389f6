"""From one way of keeping a state to another: what a checkpoint or a device asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..rounding import Dither
from . import Storage
from .bits import Bits
from .blockwise import SMALLEST_BLOCK, Blockwise
from .full import Full
from .linear import Linear

_ROOTS = ("exp_avg_sq", "exp_avg_res")
_NEVER_NEGATIVE = ("lr_mask", *_ROOTS)


def is_kept(name: str, state: Mapping[str, Any], storage: Storage) -> bool:
    """Whether one parameter's `state` holds the state `name` in the way of `storage`."""
    return all(key in state for key in storage.keys(name))


def to_full(name: str, state: Mapping[str, Any], storage: Storage, shape: torch.Size) -> Tensor:
    """One parameter's state in float32 (or bool), of the parameter's shape; a copy."""
    buffers = {key: state[key].detach().contiguous().unsqueeze(0) for key in storage.keys(name)}
    return storage.read(name, buffers, 1, shape.numel()).view(shape).clone()


def storage_of(name: str, state: Mapping[str, Any], shape: torch.Size) -> Storage | None:
    """How one parameter's `state` keeps the state `name`; None where it does not.

    Raises:
        ValueError: what it holds is of no form that a storage here writes; with the key and the reason.
    """
    if name in state:
        _check(state, name, torch.bool if name == "last_polarity" else torch.float32, tuple(shape))
        if name in _NEVER_NEGATIVE and (state[name] < 0).any():
            raise ValueError(f"the state '{name}' has negative elements")
        return Full(state[name].dtype)
    if f"{name}_q" not in state:
        return None
    if name == "last_polarity":
        _check(state, f"{name}_q", torch.uint8, (shape.numel() // 8,))
        return Bits()
    _check(state, f"{name}_q", torch.uint8, tuple(shape))
    key = f"{name}_q_scale"
    if name == "lr_mask":
        _check(state, key, torch.float32, (2,))
        low, high = state[key].tolist()
        if not 0 <= low <= high:
            raise ValueError(f"the state '{key}' has the bounds {low} and {high}")
        return Linear(low, high)
    scale = _check(state, key, torch.float32, None)
    block = shape.numel() // max(scale.numel(), 1)
    if scale.ndim != 1 or block < SMALLEST_BLOCK or block & (block - 1) or block * scale.numel() != shape.numel():
        raise ValueError(
            f"the state '{key}' has shape {tuple(scale.shape)}, which divides {tuple(shape)} into no blocks"
        )
    if (scale < 0).any():
        raise ValueError(f"the state '{key}' has negative elements")
    return Blockwise(signed=name not in _ROOTS, root=name in _ROOTS, block=block)


def coded_storage_of(name: str, state: Mapping[str, Any], shape: torch.Size, coded: Storage) -> Storage:
    """How one parameter's `state` keeps the state `name`: in full, or coded as `coded` does it.

    Raises:
        ValueError: in neither way; with the key and the reason.
    """
    if name in state:
        _check(state, name, torch.float32, tuple(shape))
        return Full()
    alone = Dither(torch.zeros(1, dtype=torch.int32), 0)
    for key, buffer in coded.allocate(name, shape, 1, 0.0, alone).items():
        _check(state, key, buffer.dtype, tuple(buffer.shape[1:]))
    return coded


def _check(state: Mapping[str, Any], key: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> Tensor:
    if key not in state:
        raise ValueError(f"the state '{key}' is missing")
    value = state[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"the state '{key}' is {type(value).__name__}, not a tensor")
    if shape is not None and value.shape != shape:
        raise ValueError(f"the state '{key}' has shape {tuple(value.shape)}")
    if value.dtype != dtype:
        raise ValueError(f"the state '{key}' is {value.dtype}, not {dtype}")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"the state '{key}' has elements that are not finite")
    return value

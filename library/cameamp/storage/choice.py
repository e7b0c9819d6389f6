"""Which storage keeps which state, in the 32-bit and the 8-bit optimizers."""

from __future__ import annotations

import torch

from ..config import OptimizerConfig
from . import Storage
from .bits import Bits
from .blockwise import Blockwise, block_of, dynamic_map
from .full import Full
from .linear import Linear

# Smaller parameters keep 32-bit states: there is nothing to save.
SMALLEST_QUANTIZED = 4096

_FULL = Full()
_FULL_BOOL = Full(torch.bool)


def full(name: str, count: int, config: OptimizerConfig) -> Storage:
    """The storage of the state `name` of a parameter with `count` elements, in the 32-bit optimizers."""
    return _FULL_BOOL if name == "last_polarity" else _FULL


def eight_bit(name: str, count: int, config: OptimizerConfig) -> Storage:
    """The storage of the state `name` of a parameter with `count` elements, in the 8-bit optimizers."""
    block = block_of(count, config.blocksize) if count >= SMALLEST_QUANTIZED else None
    if block is None:
        return full(name, count, config)
    if name == "last_polarity":
        return Bits()
    if name == "lr_mask":
        return Linear(config.min_lr, config.max_lr)
    if name in ("exp_avg_sq", "exp_avg_res"):
        return Blockwise(signed=False, root=True, block=block)
    return Blockwise(signed=True, root=False, block=block)


def require_bitsandbytes() -> None:
    """Raise RuntimeError, saying what to install, where bitsandbytes' 8-bit maps cannot be had."""
    try:
        usable = dynamic_map(signed=True).numel() == 256
    except Exception as error:  # A broken installation fails with whatever its libraries raise.
        raise RuntimeError(f"{_HELP} ({type(error).__name__}: {error})") from error
    if not usable:
        raise RuntimeError(_HELP)


_HELP = (
    "8-bit states need bitsandbytes: pip install 'bitsandbytes>=0.43'; "
    "meanwhile Automagic_CameAMP does the same with 32-bit states"
)

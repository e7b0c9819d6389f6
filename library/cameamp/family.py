"""The four optimizers, and a function that reports the loss to whichever of them a training loop holds."""

from __future__ import annotations

from typing import Any

from . import PUBLIC_MODULE
from .config import OptimizerConfig
from .optimizer import CameAMP
from .storage.choice import eight_bit, require_bitsandbytes


class Automagic_CameAMP(CameAMP):
    """All states in 32 bits: 21 bytes a parameter in the warm-up, 16 after it."""

    __module__ = PUBLIC_MODULE


class Automagic_CameAMP8bit(CameAMP):
    """States in 8 bits: a quarter of the memory. Parameters of fewer than 4,096 elements keep theirs in 32 bits.

    Raises:
        RuntimeError: bitsandbytes is missing or broken.
    """

    __module__ = PUBLIC_MODULE
    _choose_storage = staticmethod(eight_bit)

    def __init__(self, params: Any, config: OptimizerConfig | None = None, **options: Any) -> None:
        require_bitsandbytes()
        super().__init__(params, config, **options)


class Automagic_CameAMP_COptim(Automagic_CameAMP):
    """`Automagic_CameAMP` with a context, `c_optim`, that finds the learning rate for the whole optimizer.

    Call `report_loss(loss)` before each step, or give `step` a closure; without a loss the gradients alone decide.
    """

    __module__ = PUBLIC_MODULE
    _contextual = True


class Automagic_CameAMP_COptim8bit(Automagic_CameAMP8bit):
    """`Automagic_CameAMP_COptim` with states in 8 bits.

    Raises:
        RuntimeError: bitsandbytes is missing or broken.
    """

    __module__ = PUBLIC_MODULE
    _contextual = True


def report_loss(optimizer: Any, loss: Any) -> None:
    """Report to an optimizer the loss that the gradients of its next step come from, however it is wrapped.

    Args:
        optimizer: a contextual optimizer, or a wrapper such as accelerate's that holds it as `optimizer`. Every other
            object is left alone.
        loss: a number or a tensor; see `CameAMP.report_loss`.
    """
    while not isinstance(optimizer, CameAMP):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return
        optimizer = inner
    optimizer.report_loss(loss)

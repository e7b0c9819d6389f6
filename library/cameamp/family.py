"""The four optimizers that users name, which differ in how states are stored and in what drives the learning rates."""

from __future__ import annotations

from typing import Any

from . import PUBLIC_MODULE
from .config import OptimizerConfig
from .context.controller import ContextualOptimizationModule
from .context.driver import Context
from .optimizer import CameAMP
from .states import EIGHT_BITS
from .storage.blockwise import require_bitsandbytes


class Automagic_CameAMP(CameAMP):
    """All states in 32 bits: 21 bytes a parameter in the warm-up, 16 after it."""

    __module__ = PUBLIC_MODULE


class Automagic_CameAMP8bit(CameAMP):
    """States in 8 bits: a quarter of the memory. Parameters of fewer than 256 elements stay in 32 bits.

    Raises:
        RuntimeError: bitsandbytes is missing or broken.
    """

    __module__ = PUBLIC_MODULE
    _precision = EIGHT_BITS

    def __init__(self, params: Any, config: OptimizerConfig | None = None, **options: Any) -> None:
        require_bitsandbytes()
        super().__init__(params, config, **options)


class _Contextual(CameAMP):
    """An optimizer with a context."""

    _driver_class = Context
    _driver: Context

    @property
    def c_optim(self) -> ContextualOptimizationModule:
        """The context: histories, edge cases, and the multiplier that follows from them. Reading changes nothing."""
        return self._driver.module


class Automagic_CameAMP_COptim(_Contextual, Automagic_CameAMP):
    """`Automagic_CameAMP` with a context, `c_optim`, that finds the learning rate for the whole optimizer.

    Call `report_loss(loss)` before each step, or give `step` a closure; without a loss the gradients alone decide.
    """

    __module__ = PUBLIC_MODULE


class Automagic_CameAMP_COptim8bit(_Contextual, Automagic_CameAMP8bit):
    """`Automagic_CameAMP_COptim` with states in 8 bits.

    Raises:
        RuntimeError: bitsandbytes is missing or broken.
    """

    __module__ = PUBLIC_MODULE


def report_loss(optimizer: Any, loss: Any) -> None:
    """Report the loss that the gradients of an optimizer's next step come from, whatever the optimizer is wrapped in.

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

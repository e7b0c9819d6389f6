"""The Automagic_CameAMP optimizers: learning rates found element by element, for fine-tuning diffusion models.

    from library.automagic_cameamp import Automagic_CameAMP
    optimizer = Automagic_CameAMP(network.parameters(), warmup_steps=300)

In sd-scripts: `--optimizer_type library.automagic_cameamp.Automagic_CameAMP`.
"""

from __future__ import annotations

from typing import Any

from .cameamp.config import OptimizerConfig
from .cameamp.optimizer import CameAMP
from .cameamp.storage.choice import eight_bit, require_bitsandbytes

__all__ = ["Automagic_CameAMP", "Automagic_CameAMP8bit", "OptimizerConfig", "report_loss"]


class Automagic_CameAMP(CameAMP):
    """All states in 32 bits: 21 bytes a parameter in the warm-up, 16 after it."""


class Automagic_CameAMP8bit(CameAMP):
    """States in 8 bits: a quarter of the memory. Parameters of fewer than 4,096 elements keep theirs in 32 bits.

    Raises:
        RuntimeError: bitsandbytes is missing or broken.
    """

    _choose_storage = staticmethod(eight_bit)

    def __init__(self, params: Any, config: OptimizerConfig | None = None, **options: Any) -> None:
        require_bitsandbytes()
        super().__init__(params, config, **options)


def report_loss(optimizer: Any, loss: Any) -> None:
    """Tell an optimizer the loss of a batch, before it steps; several reports before one step are averaged.

    Args:
        optimizer: one of this family, also inside accelerate's wrapper; others are left alone.
        loss: a number or a 0-d tensor, which stays on its device.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, CameAMP):
        inner.report_loss(loss)

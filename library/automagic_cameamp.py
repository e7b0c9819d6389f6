"""The Automagic_CameAMP optimizers: learning rates found element by element, for fine-tuning diffusion models.

    from library.automagic_cameamp import Automagic_CameAMP
    optimizer = Automagic_CameAMP(network.parameters(), warmup_steps=300)

In sd-scripts: `--optimizer_type library.automagic_cameamp.Automagic_CameAMP`.
"""

from __future__ import annotations

from .cameamp.config import OptimizerConfig
from .cameamp.optimizer import CameAMP

__all__ = ["Automagic_CameAMP", "OptimizerConfig"]


class Automagic_CameAMP(CameAMP):
    """All states in 32 bits: 21 bytes a parameter in the warm-up, 16 after it."""

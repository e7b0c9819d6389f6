"""The Automagic_CameAMP optimizers: learning rates found element by element, for fine-tuning diffusion models.

    from library.automagic_cameamp import Automagic_CameAMP
    optimizer = Automagic_CameAMP(network.parameters(), warmup_steps=300)

In sd-scripts: `--optimizer_type library.automagic_cameamp.Automagic_CameAMP`.
"""

from .cameamp.config import OptimizerConfig
from .cameamp.family import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    report_loss,
)

__all__ = [
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "OptimizerConfig",
    "report_loss",
]

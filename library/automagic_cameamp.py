"""The import path of the Automagic_CameAMP optimizers in a checkout.

    from library.automagic_cameamp import Automagic_CameAMP
    optimizer = Automagic_CameAMP(network.parameters(), warmup_steps=300)

In sd-scripts: `--optimizer_type library.automagic_cameamp.Automagic_CameAMP`.
"""

from .cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
    OptimizerConfig,
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

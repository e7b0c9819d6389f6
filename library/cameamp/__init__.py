"""The Automagic_CameAMP optimizers: learning rates found element by element, for fine-tuning diffusion models.

    from automagic_cameamp import Automagic_CameAMP
    optimizer = Automagic_CameAMP(network.parameters(), warmup_steps=300)

This folder has two names. `pip install` installs it as `automagic_cameamp`; in a checkout it is `library.cameamp`, and
its public names are imported from `library.automagic_cameamp`.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import OptimizerConfig
    from .family import (
        Automagic_CameAMP,
        Automagic_CameAMP8bit,
        Automagic_CameAMP_COptim,
        Automagic_CameAMP_COptim8bit,
        report_loss,
    )

__version__ = "0.1.0"

__all__ = [
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "OptimizerConfig",
    "report_loss",
]

# The module from which a user imports the public names; the classes carry it as their `__module__`.
PUBLIC_MODULE = "library.automagic_cameamp" if __name__ == "library.cameamp" else __name__


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that options can be checked before torch is loaded."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(".config" if name == "OptimizerConfig" else ".family", __name__)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _refuse_a_second_copy() -> None:
    """Raise ImportError if the process has this package under its other name too.

    Each copy has classes of its own, and an optimizer of one is none of the other's: losses reported through one would
    never reach it.
    """
    other = sys.modules.get("automagic_cameamp" if __name__ == "library.cameamp" else "library.cameamp")
    if other is not None:
        raise ImportError(
            f"{__name__} ({__file__}) cannot be imported beside {other.__name__} ({other.__file__}): "
            "they are two copies of the same optimizers, with different classes. Use one name in the whole program: "
            "automagic_cameamp, which pip installed, or library.automagic_cameamp, of the checkout",
            name=__name__,
            path=__file__,
        )


_refuse_a_second_copy()

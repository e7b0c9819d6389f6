"""The optimizers of the study, and the learning rates that each is tried at."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

import library.automagic_cameamp as family

from ..contenders import FAMILY, REFERENCE, peer
from .task import Build, Named
from .variants import Variant

_UNCHANGED = Variant()

# Each rate is twice the previous one, and a grid is extended while the best rate is at its edge. Prodigy's rate is a
# factor of the rate that it finds.
_ADAM = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
PEER_RATES: dict[str, tuple[float, ...]] = {
    REFERENCE: _ADAM,
    "bitsandbytes AdamW8bit": _ADAM,
    "pytorch_optimizer CAME": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "prodigyopt Prodigy": (0.25, 0.5, 1.0, 2.0, 4.0),
    "lion_pytorch Lion": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
    "adv_optm Adopt_adv": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
}

# The first is the default. The last is max_lr, and higher rates are not allowed by default.
DEFAULT_RATE = 1e-6
FAMILY_RATES = (DEFAULT_RATE, 1e-5, 1e-4, 1e-3)
# The grid has a fifth rate, at which the plain optimizers do best on the LoRA.
_FAMILY_GRID = (DEFAULT_RATE, 1e-5, 1e-4, 3e-4, 1e-3)

PLAIN, PLAIN_8BIT = "Automagic_CameAMP", "Automagic_CameAMP8bit"
CONTEXTUAL, CONTEXTUAL_8BIT = "Automagic_CameAMP_COptim", "Automagic_CameAMP_COptim8bit"


def rates(optimizer: str) -> tuple[float, ...]:
    """The grid of an optimizer."""
    return _FAMILY_GRID if optimizer in FAMILY else PEER_RATES[optimizer]


def beyond(optimizer: str, tried: Collection[float], best: float) -> float | None:
    """The rate to try next if the best one is the lowest or the highest of those tried, else None."""
    if optimizer in FAMILY or best not in (min(tried), max(tried)):
        return None
    return best / 2 if best == min(tried) else best * 2


def builder(optimizer: str, lr: float, options: dict[str, Any], variant: Variant = _UNCHANGED) -> Build:
    """A function that builds an optimizer for named parameters.

    Args:
        optimizer: the name of one of the four optimizers or of a peer.
        lr: its learning rate.
        options: the other options.
        variant: how one of the four is changed; the options are given apart.
    """

    def build(named: Named) -> torch.optim.Optimizer:
        parameters = [p for _, p in named]
        if optimizer not in FAMILY:
            return peer(optimizer, lr=lr, **options)(parameters)
        own = variant.of(getattr(family, optimizer))(parameters, lr=lr, **options)
        own.set_parameter_names({p: name for name, p in named})
        return own

    return build

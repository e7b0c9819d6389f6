"""The optimizers of the study."""

from __future__ import annotations

from typing import Any

import torch

import library.automagic_cameamp as family

from ..contenders import FAMILY, peer
from .task import Build, Named
from .variants import Variant

_UNCHANGED = Variant()

PLAIN = "Automagic_CameAMP"
CONTEXTUAL, CONTEXTUAL_8BIT = "Automagic_CameAMP_COptim", "Automagic_CameAMP_COptim8bit"


def builder(optimizer: str, lr: float, options: dict[str, Any], variant: Variant = _UNCHANGED) -> Build:
    """A function that builds an optimizer for named parameters.

    Args:
        optimizer: the name of one of the four optimizers or of a peer.
        lr: its learning rate.
        options: the other options.
        variant: how one of the four is changed, beside its options.
    """

    def build(named: Named) -> torch.optim.Optimizer:
        parameters = [p for _, p in named]
        if optimizer not in FAMILY:
            return peer(optimizer, lr=lr, **options)(parameters)
        own = variant.of(getattr(family, optimizer))(parameters, lr=lr, **{**variant.options, **options})
        own.set_parameter_names({p: name for name, p in named})
        return own

    return build

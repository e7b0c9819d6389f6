"""The optimizers with a technique left out, or with another formula in a technique's place.

By options where there are any, else by patches: these serve a measurement, and nobody should have to choose among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from library.cameamp import context
from library.cameamp.storage import momenta
from library.cameamp.techniques import adabelief, agr, consistency, grams, lr_mask, orthograd, tam


@dataclass(frozen=True)
class Variant:
    """How the optimizers are changed.

    Attributes:
        options: their options.
        patches: (where, name, what to put there).
        warmup: length of the warm-up, as a share of the run; None for the optimizer's default.
    """

    options: dict[str, Any] = field(default_factory=dict)
    patches: tuple[tuple[Any, str, Any], ...] = ()
    warmup: float | None = 0.5


@contextlib.contextmanager
def active(variant: Variant) -> Iterator[None]:
    """The product with the patches of a variant."""
    with contextlib.ExitStack() as stack:
        for where, name, replacement in variant.patches:
            stack.enter_context(mock.patch.object(where, name, replacement))
        momenta.momentum_storages.cache_clear()
        stack.callback(momenta.momentum_storages.cache_clear)
        yield


# A technique left out -----------------------------------------------------------------------------------------------


def _as_it_is(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _without_torque(
    exp_avg: Tensor, s: Tensor, scaled_grad: Tensor, eps: float, scratch: Any = None, drive: Tensor | None = None
) -> Tensor:
    """The damping of a gradient that has nothing to do with the momentum, whatever the two are."""
    exp_avg.mul_(tam.DECAY).add_(scaled_grad if drive is None else drive, alpha=0.5)
    return scaled_grad.sub_(exp_avg)


def _without_consistency(
    exp_avg: Tensor, scaled_grad: Tensor, rate: Any, beta1: float, drive: Tensor | None = None
) -> Tensor:
    """A plain running mean."""
    exp_avg.lerp_(scaled_grad if drive is None else drive, 1 - beta1)
    return scaled_grad.sub_(exp_avg)


def _without_belief(exp_avg: Tensor, exp_avg_res: Tensor, residual: Tensor, *_: Any) -> Tensor:
    """The momentum itself."""
    return residual.copy_(exp_avg)


_NO_BELIEF = (adabelief, "divide_by_belief_", _without_belief)

LEFT_OUT: dict[str, Variant] = {
    "without AGR": Variant(patches=((agr, "regularize_", _as_it_is),)),
    "without CAME (came=False)": Variant({"came": False}),
    "without torque-aware momentum": Variant(patches=((tam, "torque_aware_momentum_", _without_torque),)),
    "without consistency momentum": Variant(patches=((consistency, "consistency_momentum_", _without_consistency),)),
    "without AdaBelief": Variant(patches=(_NO_BELIEF,)),
    "without Grams": Variant(patches=((grams, "turn_to_gradient_", _as_it_is),)),
    "without orthogonal gradient": Variant(patches=((orthograd, "remove_part_along_weights_", _as_it_is),)),
    "without the mask's bumps (lr_bump=0)": Variant({"lr_bump": 0.0}),
    "without ALLoRA (full_finetune=True)": Variant({"full_finetune": True}),
    "without weight decay (weight_decay=0)": Variant({"weight_decay": 0.0}),
    "with cautious=True": Variant({"cautious": True}),
}

CONTEXT_LEFT_OUT: dict[str, Variant] = {
    "without multi-scale momentum": Variant({"momentum_scales": ()}),
    "without codes of the momenta": Variant(patches=((momenta, "SMALLEST_CODED", 2**62),)),
    "without edge cases": Variant({"edge_threshold": 1.0}),
    "without the offset": Variant(patches=((context, "_OFFSET", 0.0),)),
    "without the multiplier": Variant({"adaptation_rate": 0.0}),
}

# Techniques alone ---------------------------------------------------------------------------------------------------

# What is left with all of them out: CAME's scaling, without which steps have no scale, and a plain momentum.
_CORE_PATCHES: dict[str, tuple[Any, str, Any]] = {
    name: LEFT_OUT[f"without {name}"].patches[0]
    for name in ("AGR", "torque-aware momentum", "consistency momentum", "AdaBelief", "Grams", "orthogonal gradient")
}
_CORE_OPTIONS: dict[str, dict[str, Any]] = {
    "multi-scale momentum": {"momentum_scales": ()},
    "the mask's bumps": {"lr_bump": 0.0},
    "ALLoRA": {"full_finetune": True},
    "weight decay": {"weight_decay": 0.0},
}


def _core(but: str = "") -> Variant:
    options: dict[str, Any] = {}
    for name, own in _CORE_OPTIONS.items():
        options.update(own if name != but else {})
    return Variant(options, tuple(patch for name, patch in _CORE_PATCHES.items() if name != but))


ALONE: dict[str, Variant] = {
    "CAME alone": _core(),
    **{f"CAME and {name}": _core(name) for name in (*_CORE_PATCHES, *_CORE_OPTIONS)},
}

# Other formulas -----------------------------------------------------------------------------------------------------


_BIAS_CORRECTED = Variant({"bias_correction": True})


def _geometric(factor: float) -> Variant:
    """A bump that multiplies or divides an element's rate, so that opposite ones cancel at every height."""

    def bump(
        mask: Tensor, polarity: Tensor, last_polarity: Tensor, lr_bump: float, min_lr: float, max_lr: float
    ) -> None:
        mask.mul_(torch.where(polarity == last_polarity, factor, 1 / factor)).clamp_(min_lr, max_lr)

    return Variant(patches=((lr_mask, "bump_", bump),))


def _together(*variants: Variant) -> Variant:
    """All their changes; the warm-up is the last one's."""
    options = {name: value for variant in variants for name, value in variant.options.items()}
    patches = tuple(patch for variant in variants for patch in variant.patches)
    return Variant(options, patches, variants[-1].warmup)


_HIGHER = Variant({"max_lr": 1e-2})
_CORRECTED_AND_HIGHER = _together(_BIAS_CORRECTED, _HIGHER)


WARMUPS: dict[str, Variant] = {
    "no warm-up": Variant(warmup=0.0),
    "warm-up of a quarter of the run": Variant(warmup=0.25),
    "warm-up of three quarters": Variant(warmup=0.75),
    "warm-up of the whole run": Variant(warmup=1.0),
    "warm-up of twice the run": Variant(warmup=2.0),
    "warmup_steps not given (500)": Variant(warmup=None),
}

FORMULAS: dict[str, Variant] = {
    "bias correction of the residual": _BIAS_CORRECTED,
    "bumps of 10 % in place of 3e-6": _geometric(1.1),
    "bias correction and bumps of 10 %": _together(_BIAS_CORRECTED, _geometric(1.1)),
}

CONTEXT_FORMULAS: dict[str, Variant] = {
    **FORMULAS,
    "max_lr=1e-2 in place of 1e-3": _HIGHER,
    "bias correction and max_lr=1e-2": _CORRECTED_AND_HIGHER,
    "gain 15 in place of 30": Variant(patches=((context, "_GAIN", 15.0),)),
    "gain 60 in place of 30": Variant(patches=((context, "_GAIN", 60.0),)),
    "offset 0.05 in place of 0.02": Variant(patches=((context, "_OFFSET", 0.05),)),
}

# Options of the contextual optimizers that promise a lower loss, alone and together.
ADVISED = "without multi-scale momentum"
_NO_SCALES, _LONG = CONTEXT_LEFT_OUT[ADVISED], WARMUPS["warm-up of twice the run"]
OPTIONS: dict[str, Variant] = {
    ADVISED: _NO_SCALES,
    "warm-up of twice the run": _LONG,
    "bias correction and max_lr=1e-2": _CORRECTED_AND_HIGHER,
    "no momenta, twice the warm-up": _together(_NO_SCALES, _LONG),
    "no momenta, correction and max_lr": _together(_NO_SCALES, _CORRECTED_AND_HIGHER),
    "no momenta, correction, max_lr, twice": _together(_NO_SCALES, _CORRECTED_AND_HIGHER, _LONG),
}

AS_IT_IS = ""
VARIANTS: dict[str, Variant] = {
    AS_IT_IS: Variant(),
    **LEFT_OUT,
    **CONTEXT_LEFT_OUT,
    **ALONE,
    **CONTEXT_FORMULAS,
    **WARMUPS,
    **OPTIONS,
}

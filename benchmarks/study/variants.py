"""The optimizers with a technique left out, or with another formula in a technique's place.

By options if there are any, else by another rule, law or precision in a class derived for the measurement: nobody
should have to choose among these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from library.cameamp.context.controller import STANDARD_LAW, Law
from library.cameamp.context.driver import Context
from library.cameamp.optimizer import CameAMP
from library.cameamp.techniques import tam


@dataclass(frozen=True)
class Variant:
    """How the optimizers are changed.

    Attributes:
        options: their options.
        techniques: other rules, by their places in `rules.Techniques`.
        law: how the multiplier of the contextual ones follows.
        codes: whether states are coded as usual; False for none.
        warmup: length of the warm-up, as a share of the run; None for the optimizer's default.
    """

    options: dict[str, Any] = field(default_factory=dict)
    techniques: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    law: Law = STANDARD_LAW
    codes: bool = True
    warmup: float | None = 0.5

    def of(self, optimizer_class: type[CameAMP]) -> type[CameAMP]:
        """One of the family, changed."""
        changed: dict[str, Any] = {
            "_techniques": optimizer_class._techniques._replace(**self.techniques),
            "_precision": replace(optimizer_class._precision, codes_none=not self.codes),
        }
        if issubclass(optimizer_class._driver_class, Context):
            changed["_driver_class"] = type("Context", (optimizer_class._driver_class,), {"law": self.law})
        return type(optimizer_class.__name__, (optimizer_class,), changed)


# A technique left out -----------------------------------------------------------------------------------------------


def _as_it_is(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _without_torque(
    exp_avg: Tensor,
    s: Tensor,
    scaled_grad: Tensor,
    eps: float,
    scratch: Any = None,
    drive: Tensor | None = None,
    sums: Any = None,
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


LEFT_OUT: dict[str, Variant] = {
    "without AGR": Variant(techniques={"regularize": _as_it_is}),
    "without CAME (came=False)": Variant({"came": False}),
    "without torque-aware momentum": Variant(techniques={"torque_aware_momentum": _without_torque}),
    "without consistency momentum": Variant(techniques={"consistency_momentum": _without_consistency}),
    "without AdaBelief": Variant(techniques={"divide_by_belief": _without_belief}),
    "without Grams": Variant(techniques={"turn_to_gradient": _as_it_is}),
    "without orthogonal gradient": Variant(techniques={"remove_part_along_weights": _as_it_is}),
    "without the mask's bumps (lr_bump=0)": Variant({"lr_bump": 0.0}),
    "without ALLoRA (full_finetune=True)": Variant({"full_finetune": True}),
    "without weight decay (weight_decay=0)": Variant({"weight_decay": 0.0}),
    "with cautious=True": Variant({"cautious": True}),
}

CONTEXT_LEFT_OUT: dict[str, Variant] = {
    "without multi-scale momentum": Variant({"momentum_scales": ()}),
    "without codes of the momenta": Variant(codes=False),
    "without edge cases": Variant({"edge_threshold": 1.0}),
    "not frozen by the schedule": Variant(law=Law(freezing=0.0)),
    "without haste": Variant(law=Law(haste=0.0)),
    "without the multiplier": Variant({"adaptation_rate": 0.0}),
}

# Techniques alone ---------------------------------------------------------------------------------------------------

# What is left with all of them out: CAME's scaling, without which steps have no scale, and a plain momentum.
_CORE_TECHNIQUES: dict[str, Mapping[str, Callable[..., Any]]] = {
    name: LEFT_OUT[f"without {name}"].techniques
    for name in ("AGR", "torque-aware momentum", "consistency momentum", "AdaBelief", "Grams", "orthogonal gradient")
}
_CORE_OPTIONS: dict[str, dict[str, Any]] = {
    "multi-scale momentum": {"momentum_scales": ()},
    "the mask's bumps": {"lr_bump": 0.0},
    "ALLoRA": {"full_finetune": True},
    "weight decay": {"weight_decay": 0.0},
}


def _core(kept: str = "") -> Variant:
    options: dict[str, Any] = {}
    techniques: dict[str, Callable[..., Any]] = {}
    for name, own in _CORE_OPTIONS.items():
        options.update(own if name != kept else {})
    for name, left_out in _CORE_TECHNIQUES.items():
        techniques.update(left_out if name != kept else {})
    return Variant(options, techniques)


ALONE: dict[str, Variant] = {
    "CAME alone": _core(),
    **{f"CAME and {name}": _core(name) for name in (*_CORE_TECHNIQUES, *_CORE_OPTIONS)},
}

# Other formulas -----------------------------------------------------------------------------------------------------


_BIAS_CORRECTED = Variant({"bias_correction": True})


def _geometric(factor: float) -> Variant:
    """A bump that multiplies or divides an element's rate, so that opposite ones cancel at every height."""

    def bump(
        mask: Tensor, polarity: Tensor, last_polarity: Tensor, lr_bump: float, min_lr: float, max_lr: float
    ) -> None:
        mask.mul_(torch.where(polarity == last_polarity, factor, 1 / factor)).clamp_(min_lr, max_lr)

    return Variant(techniques={"bump": bump})


def _together(*variants: Variant) -> Variant:
    """All their changes; the warm-up is the last one's."""
    options = {name: value for variant in variants for name, value in variant.options.items()}
    techniques = {place: rule for variant in variants for place, rule in variant.techniques.items()}
    return Variant(options, techniques, warmup=variants[-1].warmup)


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
    "gain 15 in place of 30": Variant(law=Law(gain=15.0)),
    "gain 60 in place of 30": Variant(law=Law(gain=60.0)),
    "overshooting counts in full": Variant(law=Law(overshooting=1.0)),
    "a course of 10 steps in place of 33": Variant(law=Law(kept=0.9)),
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

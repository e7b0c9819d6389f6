"""The optimizers with a technique left out, or with another law of the multiplier.

By options if there are any, else by another rule, law or precision in a class derived for the measurement: nobody
should have to choose among these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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
    """

    options: dict[str, Any] = field(default_factory=dict)
    techniques: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    law: Law = STANDARD_LAW
    codes: bool = True

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
    "without multi-scale momentum": Variant({"momentum_scales": ()}),
    "without codes of the momenta": Variant(codes=False),
    "without edge cases": Variant({"edge_threshold": 1.0}),
    "without the multiplier": Variant({"adaptation_rate": 0.0}),
}

# Other laws ---------------------------------------------------------------------------------------------------------

OTHER_LAWS: dict[str, Variant] = {
    "not frozen by the schedule": Variant(law=Law(freezing=0.0)),
    "without haste": Variant(law=Law(haste=0.0)),
    "without a pace": Variant(law=Law(pace=0.0)),
    "settling in 120 steps in place of 60": Variant(law=Law(settling=120.0)),
    "not settling while a schedule falls": Variant(law=Law(settling=math.inf)),
    "gain 15 in place of 30": Variant(law=Law(gain=15.0)),
    "gain 60 in place of 30": Variant(law=Law(gain=60.0)),
    "a course of 10 steps in place of 33": Variant(law=Law(kept=0.9)),
}
VARIANTS = {**LEFT_OUT, **OTHER_LAWS}

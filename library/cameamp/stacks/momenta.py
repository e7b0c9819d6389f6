"""The multi-scale momenta of a stack: updated together, with the sums over whole tensors that shards need for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from torch import Tensor

from ..rounding import Dither
from ..states import momentum_name
from ..storage import Stored, StoredAverage
from ..storage.averages import Update, lerp_and_sum
from ..storage.shards import StoredShardAverage
from ..techniques.multiscale import Scale
from ..techniques.sums import Sums


class Due(NamedTuple):
    """A momentum of shards that is updated at a step.

    Attributes:
        place: its place among the scales.
        momentum: the momentum.
        rate: how far it goes towards the gradient.
    """

    place: int
    momentum: StoredShardAverage
    rate: float


def due(stored: Mapping[str, Stored], scales: Sequence[Scale]) -> list[Due]:
    """The momenta among some states whose update at a step takes sums over whole tensors."""
    found = []
    for place, scale in enumerate(scales):
        momentum = stored[momentum_name(scale.period)]
        if scale.rate != 0 and isinstance(momentum, StoredShardAverage):
            found.append(Due(place, momentum, scale.rate))
    return found


def summands(stored: Mapping[str, Stored], scales: Sequence[Scale], raw: Tensor, dither: Dither) -> list[Tensor]:
    """What these sums are of, in their order; see `StoredShardAverage.summands`."""
    return [part for _, momentum, rate in due(stored, scales) for part in momentum.summands(raw, rate, dither)]


def update_momenta(
    stored: Mapping[str, Stored],
    scales: Sequence[Scale],
    target: Tensor,
    dither: Dither,
    out: Tensor,
    scratch: Tensor | None,
    sums: Sums,
) -> None:
    """Take each momentum m to (1 - rate) m + rate * target, and put the sum of share * m into `out`."""
    momenta = [cast(StoredAverage, stored[momentum_name(scale.period)]) for scale in scales]
    updated = due(stored, scales)
    if updated:
        totals, factor = sums.of_momenta(target)
        known = iter(totals)
        for place, momentum, _ in updated:
            momenta[place] = momentum.knowing([next(known) for _ in range(momentum.summand_count)], factor)
    updates = [Update(momentum, scale.rate, scale.share) for momentum, scale in zip(momenta, scales)]
    lerp_and_sum(updates, target, dither, out, scratch)

"""States of which several elements share a byte: kernels of their own write them, beside the one that writes a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import table as fields
from . import writing
from .begun import Begun, Part

_SPAN = 1024


def pack_levels(begun: Begun, part: Part, common: tuple[Tensor, ...]) -> Callable[[], None]:
    """Pack the momenta of four bits that are due; what is returned puts them where they belong.

    Args:
        begun: a group.
        part: a part of it.
        common: AGR's sum, what is known of each tensor, the numbers of the step, and the values of the 8-bit maps.
    """
    _, sums, numbers, _ = common
    pending = []
    for place in part.due:
        chosen = (part.entries[:, place, fields.KIND] == fields.FOUR_BITS) & part.members
        if not chosen.any():
            continue
        halves = (begun.table[:, fields.SPAN] + 1) // 2 * chosen
        bytes_of = begun.counts((part.name, place, "bytes"), -(-halves // _SPAN))
        places = begun.firsts((part.name, place, "halves"), halves)
        packed = torch.empty(int(halves.sum()), dtype=torch.int8, device=begun.device)
        every = (begun.on_device, part.momenta, bytes_of.work, places)
        constants: dict[str, Any] = {"SPAN": _SPAN, "PLACE": place, "RULES": part.rules}
        begun.launch(writing.pack_levels, bytes_of.count, *every, *common, packed, **constants)
        pending.append((bytes_of.count, (*every, sums, numbers, packed), constants))

    def keep() -> None:
        for count, arguments, constants in pending:
            begun.launch(writing.keep_levels, count, *arguments, **constants)

    return keep


def pack_signs(begun: Begun, part: Part) -> None:
    """Write the signs of this step's gradients, where they have a bit each."""
    kinds = begun.table[:, fields.STATES + 3 * fields.STATE_NUMBERS["last_polarity"] + fields.KIND]
    packed = (kinds == fields.PACKED) & part.members
    if part.rules.warmup and packed.any():
        bytes_of = begun.counts((part.name, "signs"), -(-begun.table[:, fields.SPAN] // (8 * _SPAN)) * packed)
        begun.launch(
            writing.pack_signs, bytes_of.count, begun.on_device, bytes_of.work, begun.total, SPAN=_SPAN,
            RULES=part.rules,
        )  # fmt: skip

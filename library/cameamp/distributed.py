"""Values that all ranks of a distributed run must agree on."""

from __future__ import annotations

from torch import Tensor, distributed


def average(values: Tensor) -> Tensor:
    """The mean of `values` over all ranks, with the same bits on each. With a single rank this is `values` itself."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values

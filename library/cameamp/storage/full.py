"""States kept as they are: the rules update the buffers themselves."""

from __future__ import annotations

import torch
from torch import Tensor


class Full:
    """One buffer per state, of the dtype the rules compute in."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def keys(self, name: str) -> tuple[str, ...]:
        """The state keys of the state `name`."""
        return (name,)

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, device: torch.device) -> dict[str, Tensor]:
        """Buffers of n parameters of `shape`, every element `fill`."""
        return {name: torch.full((n, *shape), fill, dtype=self.dtype, device=device)}

    def read(self, name: str, buffers: dict[str, Tensor], rows: int, columns: int) -> Tensor:
        """The state as (n, rows, columns): the buffer itself, so that updates need no writing back."""
        return buffers[name].view(-1, rows, columns)

    def write(self, name: str, buffers: dict[str, Tensor], stack: Tensor) -> None:
        """Nothing to do: `stack` is the buffer."""

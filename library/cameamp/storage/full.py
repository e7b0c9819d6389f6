"""States kept as they are: the rules update the buffers themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import Dither
from . import Buffers, Moved


@dataclass(frozen=True)
class Full:
    """One buffer per state, of the dtype the rules compute in."""

    dtype: torch.dtype = torch.float32

    def keys(self, name: str) -> tuple[str, ...]:
        return (name,)

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, dither: Dither) -> Buffers:
        return {name: torch.full((n, *shape), fill, dtype=self.dtype, device=dither.device)}

    def read(self, name: str, buffers: Buffers, rows: int, columns: int, out: Tensor | None = None) -> Tensor:
        return buffers[name].view(-1, rows, columns)

    def write(self, name: str, buffers: Buffers, stack: Tensor, dither: Dither) -> None:
        buffer = buffers[name]
        if stack.data_ptr() != buffer.data_ptr():  # Rules mostly update the buffer itself.
            buffer.copy_(stack.view_as(buffer))

    def move(
        self,
        name: str,
        buffers: Buffers,
        target: Tensor,
        rate: float,
        dither: Dither,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Moved:
        moved = buffers[name].view(target.shape).lerp_(target, rate)
        return Moved(moved.clone() if out is None else out.copy_(moved), 1.0)

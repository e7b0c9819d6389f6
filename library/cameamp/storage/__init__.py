"""How a state tensor is kept between steps. No storage knows what it stores, no rule how its state is stored.

A storage turns one state of a stack of n same-shape parameters into named buffers, whose slices are what
`optimizer.state[p]` holds, and gives the rules a float32 (or bool) stack to work on.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..rounding import Dither

Buffers = dict[str, Tensor]


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter, which has elements, seen as a matrix: its first dimension, and the others."""
    rows = shape[0] if len(shape) > 0 else 1
    return rows, shape.numel() // rows


class Storage(Protocol):
    """How one state of a stack is kept."""

    def keys(self, name: str) -> tuple[str, ...]:
        """The state keys that hold the state `name`."""

    def allocate(self, name: str, shape: torch.Size, n: int, fill: float, dither: Dither) -> Buffers:
        """Buffers for n parameters of `shape` whose elements are all `fill`, on dither's device: {key: (n, ...)}."""

    def read(self, name: str, buffers: Buffers, rows: int, columns: int, out: Tensor | None = None) -> Tensor:
        """The state as (n, rows, columns), for rules to update in place; unpacked into `out` where that helps."""

    def write(self, name: str, buffers: Buffers, stack: Tensor, dither: Dither) -> None:
        """Keep what the rules made of the stack that `read` gave; `stack` may be overwritten."""


class Moved(NamedTuple):
    """A state that has moved, as it was before it was packed: `factor` times `stack`, (n, rows, columns)."""

    stack: Tensor
    factor: float


class MovingStorage(Storage, Protocol):
    """How a state is kept that only ever moves towards something: a momentum."""

    def move(
        self,
        name: str,
        buffers: Buffers,
        target: Tensor,
        rate: float,
        dither: Dither,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Moved | None:
        """Keep (1 - rate) * state + rate * target.

        Args:
            target: (n, rows, columns); left as it is.
            rate: above 0, at most 1.
            out: memory for the stack that is returned, of target's shape; allocated where None and needed.
            scratch: memory to compute in, likewise.

        Returns:
            That sum, a copy; None from storages that never unpack it.
        """

"""How a state is stored between steps. No format knows what it stores, and no rule how its states are stored.

A `Format` describes a way to write numbers down: which tensors it takes, and how large they are. What it makes of a
stack of n parameters of one shape is a `Stored`, which owns these tensors: it gives a rule the numbers as float32 (or
bool), and writes down what the rule made of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..rounding import Dither


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix: its first dimension, and the others."""
    return (shape[0], shape[1:].numel()) if len(shape) > 0 else (1, 1)


class Spread(Enum):
    """How a tensor that belongs to a parameter is spread over the processes that hold its shards."""

    BY_ROW = "each row is where the same row of the parameter is"
    EACH = "each process has one of its own, all of one size"
    SAME = "the same everywhere"


class Part(NamedTuple):
    """One of the tensors that a format writes.

    Attributes:
        dtype: its dtype.
        shape: its shape, for a single parameter.
        zero: the value of its elements while the state is 0.
        spread: how it is spread over the processes that hold shards of the parameter.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    zero: int = 0
    spread: Spread = Spread.SAME


class Format(ABC):
    """A way to write a state down. Formats are immutable, and equal ones read each other's tensors."""

    @abstractmethod
    def parts(self, shape: torch.Size) -> dict[str, Part]:
        """The tensors that a state of a parameter of `shape` takes, by what their keys append to the state's name."""

    @abstractmethod
    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> Stored:
        """A state of n parameters of `shape` in existing tensors, (n, ...) each, in the order of `parts`."""

    def as_saved(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> Format:
        """The format of this kind that a checkpoint was written in.

        Args:
            tensors: one parameter's, by the same suffixes as `parts`; of the right dtype, and finite.
            shape: the parameter's.

        Raises:
            ValueError: no format of this kind has written them: the suffix that is wrong, a colon, and the reason.
        """
        for suffix, part in self.parts(shape).items():
            if tensors[suffix].shape != part.shape:
                raise ValueError(f"{suffix}: has shape {tuple(tensors[suffix].shape)}")
        return self

    def new(self, n: int, shape: torch.Size, device: torch.device) -> Stored:
        """A state of n parameters of `shape`, all of it 0."""
        return self.over(
            [
                torch.full((n, *part.shape), part.zero, dtype=part.dtype, device=device)
                for part in self.parts(shape).values()
            ],
            shape,
        )

    def keys(self, name: str) -> tuple[str, ...]:
        """The keys under which `optimizer.state[p]` holds the tensors of the state `name`."""
        return tuple(name + suffix for suffix in self.suffixes)

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """What the keys of the tensors append to the state's name, in the order of `parts`."""

    def bytes(self, shape: torch.Size) -> int:
        """What a state of one parameter of `shape` takes."""
        return sum(part.dtype.itemsize * torch.Size(part.shape).numel() for part in self.parts(shape).values())


class Stored(ABC):
    """A state of n parameters of one shape, each seen as a matrix.

    Attributes:
        tensors: what it is written in, (n, ...) each.
    """

    def __init__(self, tensors: Sequence[Tensor], shape: torch.Size) -> None:
        self.tensors = tuple(tensors)
        self.rows, self.columns = matrix_shape(shape)

    @abstractmethod
    def read(self, out: Tensor | None = None) -> Tensor:
        """The state as (n, rows, columns), for a rule to update in place; unpacked into `out` if that helps."""

    @abstractmethod
    def write(self, stack: Tensor, dither: Dither) -> None:
        """Write down what a rule made of the stack that `read` gave; `stack` may be overwritten."""

    def fill(self, value: float, dither: Dither) -> None:
        """Set every element to `value`."""
        n = len(self.tensors[0])
        size = (n, self.rows, self.columns)
        self.write(torch.full(size, value, dtype=torch.float32, device=self.tensors[0].device), dither)


class Scaled(NamedTuple):
    """The numbers `factor * stack`, of which only `stack`, (n, rows, columns), is in memory."""

    stack: Tensor
    factor: float


class StoredAverage(Stored):
    """A running average: a state that every update moves a part of the way towards a target."""

    @abstractmethod
    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Scaled | None:
        """Set the state to (1 - rate) * state + rate * target.

        Args:
            target: (n, rows, columns); left as it is.
            rate: above 0, at most 1.
            dither: what rounding depends on.
            out: memory for the result, of target's shape; allocated if it is None and needed.
            scratch: memory to compute in, likewise.

        Returns:
            A copy of the sum, as it was before it was written down; None from formats that never unpack it.
        """


class AverageFormat(Format):
    """A format of running averages."""

    @abstractmethod
    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredAverage: ...

    def new(self, n: int, shape: torch.Size, device: torch.device) -> StoredAverage:
        stored = super().new(n, shape, device)
        assert isinstance(stored, StoredAverage)
        return stored

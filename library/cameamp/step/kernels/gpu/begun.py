"""A group between its two passes: its tensors on the device, and how they are cut into parts that one kernel visits."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ....stacks.stack import Stack
from .. import table as fields
from ..table import Batch
from .layout import Layouts, Parts, uploaded
from .rules import Rules


class Part(NamedTuple):
    """Tensors of one group that one kernel visits.

    Attributes:
        rules: what kernels are compiled for.
        members: which rows of the group's table, bool.
        lengths: how many elements a program of a span takes, of each row.
        span: the room for them, a power of two.
        numbers: those of the step.
        momenta: the entries of the momenta that have begun, for all rows of the table, on the device.
        entries: the same on the host.
        due: which of these momenta are updated.
        name: what the layouts of these tensors are kept under.
    """

    rules: Rules
    members: numpy.ndarray
    lengths: numpy.ndarray
    span: int
    numbers: Tensor
    momenta: Tensor
    entries: numpy.ndarray
    due: list[int]
    name: Hashable


@dataclass
class Begun:
    """A group between its two passes.

    Attributes:
        stacks: its stacks, in the table's order.
        table: on the host, and
        on_device: on the device.
        batches: each batch of tensors with its parts, of which one kernel visits each.
        total: AGR's sum, 0-d.
        strengths: theta of each tensor; empty where nothing decays.
        written_back: weights that were copied, each beside its copy.
        kept: gradients that were copied.
        layouts: those that are kept from step to step.
    """

    stacks: list[Stack]
    table: numpy.ndarray
    on_device: Tensor
    batches: list[tuple[Batch, list[Part]]]
    total: Tensor
    strengths: Tensor
    written_back: list[tuple[Tensor, Tensor]]
    kept: list[Tensor]
    layouts: Layouts

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.on_device.device

    @property
    def sizes(self) -> numpy.ndarray:
        """Elements of each tensor."""
        sizes: numpy.ndarray = self.table[:, fields.NUMEL]
        return sizes

    def rows_of(self, stack: Stack) -> slice:
        """The rows of the table that are a stack's."""
        start = sum(len(other) for other in self.stacks[: self.stacks.index(stack)])
        return slice(start, start + len(stack))

    def spans(self, part: Part) -> Parts:
        """The spans of a part."""
        return self.counts((part.name, part.span), -(-self.sizes // part.lengths) * part.members)

    def counts(self, name: Hashable, counts: numpy.ndarray) -> Parts:
        """So many parts of each row of the table; kept under a name."""
        parts: Parts = self.layouts.layout((name, self.device), counts, lambda c: Parts.of(c, self.device))
        return parts

    def firsts(self, name: Hashable, counts: numpy.ndarray) -> Tensor:
        """Where each row begins in a memory that has so many places for each; kept under a name."""
        firsts: Tensor = self.layouts.layout((name, self.device), counts, lambda c: uploaded(_before(c), self.device))
        return firsts

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """As of `Launcher`."""
        self.layouts.launch(kernel, programs, *arguments, **constants)


def _before(counts: numpy.ndarray) -> numpy.ndarray:
    """The sum of all counts before each, int64: the elements of all tensors may be more than int32 can count."""
    before: numpy.ndarray = numpy.cumsum(counts, dtype=numpy.int64) - counts
    return before

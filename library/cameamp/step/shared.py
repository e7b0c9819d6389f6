"""What the processes that hold the shards of some tensors tell one another in a step.

A step that needs sums over whole tensors has questions, the same of all processes and in the same order. One message
answers the first question of all stacks, the next one the second. Kernels take pass after pass, and ask in between.

A rule asks `Sums`. With rules the steps of all stacks are rehearsed up to the first question, on copies of their
states; then all are rehearsed up to the next question, until the step itself finds every answer that it asks for. That
costs arithmetic and no memory: to interrupt the steps, and go on with them, would need room for what each has computed
so far. What a process tells the others does not depend on how it finds it, so each may take kernels or rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..groups import Group
from ..sharding import Processes, totals_of
from ..stacks.momenta import due, summands
from ..stacks.stack import Stack
from ..techniques.multiscale import Scale
from ..techniques.sums import Sums
from .measure import Magnitudes

# Below this share of a tensor's norm, squared, what is left of it is the rounding of float32.
_SMALLEST_REST = 2.0**-24

# The sums that answer one question of one stack.
Answer = Sequence[Tensor]


class Questions(Protocol):
    """What the step of a stack of shards asks, one question after the other.

    Attributes:
        number: how many.
    """

    number: int

    def ask(self) -> Answer:
        """This process's part of what is asked next; every question before it has been answered."""

    def hear(self, answer: Answer) -> None:
        """Take in the answer to the last question."""


class Asks(NamedTuple):
    """What a step of shards asks of the other processes, a question each, in this order.

    Attributes:
        of_scaled: CAME's bound, and what momenta need.
        of_columns: TAM's norms.
        of_updates: what the orthogonal gradient takes off.
        of_agreement: how much of an update Cautious keeps.
    """

    of_scaled: bool
    of_columns: bool
    of_updates: bool
    of_agreement: bool

    @classmethod
    def of(cls, group: Group, stack: Stack, scales: Sequence[Scale]) -> Asks:
        """Of a bound stack and its multi-scale momenta at this step."""
        config, early = group.config, group.phase(stack).early
        numel = stack.whole_rows * stack.columns
        return cls(config.came or bool(due(stack.stored, scales)), early, early and numel > 1, config.cautious)


class _OpenQuestionError(Exception):
    """A rule asked what no message has answered yet.

    Attributes:
        parts: the sums over the shards of this process.
    """

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts


class SumsOfShards(Sums):
    """Sums over the tensors of a stack of which this process holds a part, as far as they are known.

    They are added in float64, except those over rows, of which there are many.

    Args:
        stack: the stack.
        scales: its multi-scale momenta at this step.
        answers: the sums that answer the first questions.
    """

    def __init__(self, stack: Stack, scales: Sequence[Scale], answers: Iterable[Answer]) -> None:
        self._stack = stack
        self._scales = scales
        self._numel = stack.whole_rows * stack.columns
        self._answers: Iterator[Answer] = iter(answers)
        self._of_momenta: Answer | None = None
        self._factor: Tensor | None = None

    def numel(self, stack: Tensor) -> int:
        return self._numel

    def norms(self, stack: Tensor) -> Tensor:
        squares, *self._of_momenta = self._total(
            lambda: [stack.square().sum(dim=(1, 2), dtype=torch.float64), *self._summands(stack)]
        )
        return squares.sqrt().to(stack.dtype)

    def scaled_by(self, factor: Tensor) -> None:
        self._factor = factor

    def of_momenta(self, target: Tensor) -> tuple[Answer, Tensor | None]:
        if self._of_momenta is None:
            self._of_momenta = self._total(lambda: self._summands(target))
        return self._of_momenta, self._factor

    def over_rows(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(total.to(part.dtype, copy=True) for total, part in zip(self._total(lambda: parts), parts))

    def norms_and_products(self, x: Tensor, y: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        room = None if scratch is None else scratch.view_as(x)
        x_squares, y_squares, products = self._total(
            lambda: [
                torch.mul(a, b, out=room).sum(1, keepdim=True, dtype=torch.float64) for a, b in ((x, x), (y, y), (x, y))
            ]
        )
        # By Pythagoras, which saves a message.
        rest = (x_squares - products.square() / y_squares).maximum(x_squares * _SMALLEST_REST)
        self._norms_of_rest = rest.sqrt().to(x.dtype)
        return x_squares.sqrt().to(x.dtype), y_squares.sqrt().to(x.dtype), products.to(x.dtype)

    def norms_of_rest(self, rest: Tensor) -> Tensor:
        return self._norms_of_rest

    def counts(self, ones: Tensor) -> Tensor:
        (total,) = self._total(lambda: [ones.sum(dim=(1, 2), keepdim=True, dtype=torch.float64)])
        return total.to(ones.dtype)

    def _summands(self, raw: Tensor) -> list[Tensor]:
        return summands(self._stack.stored, self._scales, raw, self._stack.dither())

    def _total(self, parts: Callable[[], Answer]) -> Answer:
        answer = next(self._answers, None)
        if answer is None:
            raise _OpenQuestionError(*parts())
        return answer


def answers(questions: Mapping[Stack, Questions], processes: Processes) -> dict[Stack, list[Answer]]:
    """The sums that the steps of some stacks of shards ask for, a message for each question.

    Args:
        questions: what the step of each stack asks.
        processes: those that hold the shards.
    """
    known: dict[Stack, list[Answer]] = {stack: [] for stack in questions}
    for number in range(max((each.number for each in questions.values()), default=0)):
        asking = [stack for stack, each in questions.items() if each.number > number]
        own = [(stack.cut, questions[stack].ask()) for stack in asking]
        for stack, answer in zip(asking, totals_of(processes, own)):
            questions[stack].hear(answer)
            known[stack].append(answer)
    return known


class Rehearsals:
    """The questions of a stack whose steps are rehearsed.

    Args:
        stack: the stack.
        scales: its multi-scale momenta at this step.
        number: how many questions.
        rehearse: takes the step with some sums, on copies.
    """

    def __init__(self, stack: Stack, scales: Sequence[Scale], number: int, rehearse: Callable[[Sums], None]) -> None:
        self.number = number
        self._stack = stack
        self._scales = scales
        self._rehearse = rehearse
        self._known: list[Answer] = []

    def ask(self) -> Answer:
        """Rehearse up to the first question without an answer."""
        try:
            self._rehearse(SumsOfShards(self._stack, self._scales, self._known))
        except _OpenQuestionError as question:
            return question.parts
        raise AssertionError("a step asks less than was counted")

    def hear(self, answer: Answer) -> None:
        """Keep the answer for the next rehearsal."""
        self._known.append(answer)


def measured_parts(stack: Stack, found: Magnitudes) -> Tensor:
    """What this process adds to the magnitudes of whole tensors: a float64 vector for `whole_magnitudes`."""
    sums, elements = found.abs_sums.double(), stack.rows * stack.columns
    parts = [sums, found.nonzero_count.double().view(1)]
    if found.deviations is not None:
        # Around 0, because the mean of the whole tensor is not known yet.
        parts.append(found.deviations.double() + sums.square() / max(elements, 1))
    return torch.cat(parts)


def whole_magnitudes(stack: Stack, total: Tensor) -> Magnitudes:
    """The magnitudes of whole tensors, from the sum of what `measured_parts` gave."""
    sums, count, *squares = total.split([len(stack), 1, *[len(stack)] * (len(total) > len(stack) + 1)])
    deviations = None
    if squares:
        mean_squares = sums.square() / (stack.whole_rows * stack.columns)
        deviations = (squares[0] - mean_squares).clamp_min_(0.0).float()
    return Magnitudes(sums.float(), count.float().squeeze(0), deviations)

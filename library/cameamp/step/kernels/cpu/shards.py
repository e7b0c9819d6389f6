"""A step of a stack of shards: after some of its passes it waits for the sums over whole tensors."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy
import torch
from torch import Tensor

from ....stacks.momenta import due
from ....stacks.stack import Stack
from ....storage.low_rank_shards import StoredLowRankOfShard
from ....storage.shards import StoredNibblesOfShard
from ....techniques.came import bounding_factor_
from ....techniques.multiscale import Scale
from ...shared import Answer, Asks
from . import passes
from .cut import CutStep, Totals

# What the orthogonal gradient asks for, in this order.
_OF_UPDATES = [passes.UPDATE, passes.WEIGHTS, passes.ALONG]


class StepOfShards:
    """Asks what the rules ask, in the same order and form, so that a process may ask either way.

    Momenta of low rank follow by the functions of their format, as in the rules, and by the same bits of what all
    processes know: so all have the same right factors.

    Args:
        step: the step.
        stack: the shards.
        scales: their multi-scale momenta at this step.
        clip_threshold: the bound of the root mean square; None for none, which is then not asked for.
        asks: what the step asks.

    Attributes:
        number: how many questions that is.
    """

    def __init__(
        self,
        step: CutStep,
        stack: Stack,
        scales: Sequence[Scale],
        clip_threshold: float | None,
        asks: Asks,
    ) -> None:
        self.number = sum(asks)
        self._step = step
        self._stack = stack
        self._due = due(stack.stored, scales)
        early = asks.of_columns
        self._asks = {
            passes.SCALED: asks.of_scaled,
            passes.COLUMN_NORMS: asks.of_columns,
            passes.UPDATES: asks.of_updates if early else asks.of_agreement,
            passes.AGREEMENTS: asks.of_agreement,
        }
        self._clip_threshold = clip_threshold
        self._early = early
        # What the low rank at a place among the momenta has seen of the gradients, and what all processes have.
        self._seen: dict[int, Tensor] = {}
        self._totals: dict[int, Answer] = {}
        self._factors: Tensor | None = None  # Of the scaled gradients, as the rules find them.
        self._course = self._take()
        self._heard: Answer | None = None

    def ask(self) -> Answer:
        """Take the step to its next question, and return this process's part of it."""
        return next(self._course) if self._heard is None else self._course.send(self._heard)

    def hear(self, answer: Answer) -> None:
        """Keep the answer, with which the step goes on."""
        self._heard = answer

    def finish(self) -> None:
        """Take the step to its end, after all answers."""
        try:
            self.ask()
        except StopIteration:
            return
        raise AssertionError("a step of shards asks more than the rules do")

    def _take(self) -> Generator[Answer, Answer, None]:
        for stage in self._step.stages:
            if stage == passes.SCALED:
                totals, asked = self._look()
            else:
                totals = self._step.take(stage)
                asked = self._asked(stage, totals) if self._asks.get(stage) else []
            if self._asks.get(stage):
                answer = yield asked
                self._put(stage, answer, totals)
            self._step.conclude(stage, totals)
            if stage == passes.SCALED:
                self._follow()

    def _look(self) -> tuple[Totals, Answer]:
        """The pass over scaled gradients, and what is asked after it."""
        stack = self._stack
        shown = None
        if any(isinstance(momentum, StoredLowRankOfShard) for _, momentum, _ in self._due):
            shown = numpy.empty((len(stack), stack.rows * stack.columns), dtype=numpy.float32)
        totals = self._step.take(passes.SCALED, shown)
        sums = torch.from_numpy(totals.sums)
        asked = [sums[:, passes.SQUARE]] if self._clip_threshold is not None else []
        for place, momentum, rate in self._due:
            if isinstance(momentum, StoredLowRankOfShard):
                assert shown is not None
                self._seen[place], summands = momentum.look(torch.from_numpy(shown), rate, stack.dither())
                asked += summands
            elif isinstance(momentum, StoredNibblesOfShard):
                asked.append(sums[:, _norm_columns(place)])
            else:
                asked += momentum.summands(sums, rate, stack.dither())
        return totals, asked

    def _follow(self) -> None:
        """Update the momenta of low rank."""
        for place, momentum, rate in self._due:
            if isinstance(momentum, StoredLowRankOfShard):
                seen, factors = self._seen.pop(place), self._factors
                seen = seen if factors is None else seen * factors.view(-1, 1, 1)
                momentum.follow(seen, self._totals.pop(place), factors, rate, self._stack.dither())

    def _asked(self, stage: int, totals: Totals) -> Answer:
        """Sums in the shapes in which the rules ask for them."""
        sums = torch.from_numpy(totals.sums)
        if stage == passes.COLUMN_NORMS:
            return [part.unsqueeze(1) for part in torch.from_numpy(totals.columns).unbind(1)]
        if stage == passes.UPDATES and self._early:
            return [sums[:, column : column + 1] for column in _OF_UPDATES]
        return [sums[:, passes.AGREEING].view(-1, 1, 1)]

    def _put(self, stage: int, answer: Answer, totals: Totals) -> None:
        """The answers in the place of the sums."""
        if stage == passes.SCALED:
            self._put_scaled(answer, totals)
            return
        numbers = [numpy.asarray(part.numpy()) for part in answer]
        if stage == passes.COLUMN_NORMS:
            for place, part in enumerate(numbers):
                totals.columns[:, place] = part[:, 0]
            return
        columns = _OF_UPDATES if stage == passes.UPDATES and self._early else [passes.AGREEING]
        for column, part in zip(columns, numbers):
            totals.sums[:, column] = part.reshape(-1)

    def _put_scaled(self, answer: Answer, totals: Totals) -> None:
        parts = iter(answer)
        if self._clip_threshold is not None:
            squares = next(parts)
            totals.sums[:, passes.SQUARE] = squares.numpy()
            numel = self._stack.whole_rows * self._stack.columns
            self._factors = bounding_factor_(squares.sqrt().float(), numel, self._clip_threshold)
        for place, momentum, _ in self._due:
            own = [next(parts) for _ in range(momentum.summand_count)]
            if isinstance(momentum, StoredLowRankOfShard):
                self._totals[place] = own
            elif isinstance(momentum, StoredNibblesOfShard):
                totals.sums[:, _norm_columns(place)] = own[0].numpy()


def _norm_columns(place: int) -> list[int]:
    """Of the sums, those that the norm of a new four-bit momentum follows from."""
    return [passes.SQUARE, passes.PRODUCTS + 2 * place, passes.PRODUCTS + 2 * place + 1]

"""A step of a stack of shards: after some of its passes it waits for the sums over whole tensors."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy
import torch

from ...shared import Answer
from . import passes
from .cut import CutStep, Totals

# What the orthogonal gradient asks for, in this order.
_OF_UPDATES = [passes.UPDATE, passes.WEIGHTS, passes.ALONG]


class StepOfShards:
    """Asks what the rules ask, in the same order and form, so that a process may ask either way.

    Args:
        step: the step.
        came: whether the bound on the root mean square is asked for.
        early: whether it is of the early phase.
        cautious: whether it is asked how much of the update agrees with the gradient.
        numel: elements of a whole tensor.
    """

    def __init__(self, step: CutStep, came: bool, early: bool, cautious: bool, numel: int) -> None:
        self._step = step
        self._asks = {
            passes.SCALED: came,
            passes.COLUMN_NORMS: early,
            passes.UPDATES: numel > 1 if early else cautious,
            passes.AGREEMENTS: cautious,
        }
        self._early = early
        self._course = self._take()

    def question(self, known: Sequence[Answer]) -> Answer:
        """This process's part of what the step asks after some answers."""
        return next(self._course) if not known else self._course.send(known[-1])

    def finish(self, known: Sequence[Answer]) -> None:
        """Take the step to its end, after all answers."""
        try:
            self.question(known)
        except StopIteration:
            return
        raise AssertionError("a step of shards asks more than the rules do")

    def _take(self) -> Generator[Answer, Answer, None]:
        for stage in self._step.stages:
            totals = self._step.take(stage)
            if self._asks.get(stage):
                answer = yield self._asked(stage, totals)
                self._put(stage, answer, totals)
            self._step.conclude(stage, totals)

    def _asked(self, stage: int, totals: Totals) -> Answer:
        """Sums in the shapes in which the rules ask for them."""
        sums = torch.from_numpy(totals.sums)
        if stage == passes.SCALED:
            return [sums[:, passes.SQUARE]]
        if stage == passes.COLUMN_NORMS:
            return [part.unsqueeze(1) for part in torch.from_numpy(totals.columns).unbind(1)]
        if stage == passes.UPDATES and self._early:
            return [sums[:, column : column + 1] for column in _OF_UPDATES]
        return [sums[:, passes.AGREEING].view(-1, 1, 1)]

    def _put(self, stage: int, answer: Answer, totals: Totals) -> None:
        """The answers in the place of the sums."""
        numbers = [numpy.asarray(part.numpy()) for part in answer]
        if stage == passes.COLUMN_NORMS:
            for place, part in enumerate(numbers):
                totals.columns[:, place] = part[:, 0]
            return
        columns = [passes.SQUARE] if stage == passes.SCALED else [passes.AGREEING]
        if stage == passes.UPDATES and self._early:
            columns = _OF_UPDATES
        for column, part in zip(columns, numbers):
            totals.sums[:, column] = part.reshape(-1)

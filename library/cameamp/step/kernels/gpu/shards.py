"""A step of stacks of shards: between its kernels it waits for the sums over whole tensors."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy
import torch
from torch import Tensor

from ....config import OptimizerConfig
from ....groups import Group
from ....stacks.momenta import due
from ....stacks.stack import Stack
from ....storage.low_rank_shards import StoredLowRankOfShard
from ....storage.shards import StoredNibblesOfShard
from ....techniques import tam
from ....techniques.came import bounding_factor_
from ...rules import StepScalars
from ...shared import Answer, Asks
from .. import table as fields
from .begun import Begun
from .course import Columns, Course, Sums
from .launching import on

# Of the sums of an update, u.p, u.u and p.p, those that the orthogonal gradient asks for, in its order.
_OF_UPDATES = 1, 2, 0


class StepOfShards:
    """Asks what the rules ask, in the same order and form, so that a process may ask either way.

    Momenta of low rank follow by the functions of their format, as in the rules: so all processes have the same right
    factors.

    Args:
        group: the group.
        begun: its tensors.
        courses: the parts that the stacks are in.
        stacks: stacks of the same traits, which ask the same.

    Attributes:
        number: how many questions it has about each stack.
    """

    def __init__(self, group: Group, begun: Begun, courses: Sequence[Course], stacks: Sequence[Stack]) -> None:
        scales = StepScalars.of(group, stacks[0].traits).scales
        asks = Asks.of(group, stacks[0], scales)
        self.number = sum(asks)
        self._config: OptimizerConfig = group.config
        self._begun = begun
        self._courses = courses
        self._stacks = {stack: begun.rows_of(stack) for stack in stacks}
        self._asks = asks
        self._due = {stack: due(stack.stored, scales) for stack in stacks}
        # A kernel knows the momenta by their places among those that have begun.
        begun_scales = [place for place, scale in enumerate(scales) if scale.share != 0]
        self._numbers = {place: number for number, place in enumerate(begun_scales)}
        # What the low rank of a stack has seen of the gradients, by its place among the momenta.
        self._seen: dict[tuple[Stack, int], Tensor] = {}
        self._course = self._take()
        self._asked: dict[Stack, Answer] = {}
        self._heard: dict[Stack, Answer] = {}

    def questions(self) -> dict[Stack, QuestionsOfStack]:
        """What the step asks about each stack."""
        return {stack: QuestionsOfStack(self, stack) for stack in self._stacks}

    def ask(self, stack: Stack) -> Answer:
        """Go on to the next question, if no other stack has asked it yet; this process's part about one stack."""
        if not self._asked:
            with on(self._begun.device):
                self._asked = self._course.send(self._heard) if self._heard else next(self._course)
            self._heard = {}
        return self._asked.pop(stack)

    def hear(self, stack: Stack, answer: Answer) -> None:
        """Keep an answer until all stacks have theirs."""
        self._heard[stack] = answer

    def finish(self) -> None:
        """Take the step to its end, after all answers."""
        try:
            with on(self._begun.device):
                self._course.send(self._heard) if self._heard else next(self._course)
        except StopIteration:
            return
        raise AssertionError("a step of shards asks more than the rules do")

    def _take(self) -> Generator[dict[Stack, Answer], Mapping[Stack, Answer], None]:
        courses, asks = self._courses, self._asks
        totals = self._totals([course.sum_scaled() for course in courses])
        if asks.of_scaled:
            heard = yield {stack: self._of_scaled(stack, totals.values) for stack in self._stacks}
            for stack in self._stacks:
                self._take_in_scaled(stack, heard[stack], totals.values)
        for course in courses:
            course.conclude_scaled(totals)
        if asks.of_columns:
            momentum, drive = self._columns()
            heard = yield {
                stack: [self._columns_of(stack, each.values) for each in (momentum, drive)] for stack in self._stacks
            }
            for stack in self._stacks:
                for each, answer in zip((momentum, drive), heard[stack]):
                    self._columns_of(stack, each.values).copy_(answer)
            norms = [each.values.sqrt_().clamp_min_(tam.SMALLEST_NORM) for each in (momentum, drive)]
            for course in courses:
                course.norms = Columns(momentum.places, norms[0] * norms[1])
            totals = self._totals([course.sum_updates() for course in courses])
            if asks.of_updates:
                yield from self._over_processes(totals.values, _OF_UPDATES)
            for course in courses:
                course.conclude_updates(totals)
        if asks.of_agreement:
            totals = self._totals([course.sum_agreement() for course in courses])
            yield from self._over_processes(totals.values, (0,), 1)
            for course in courses:
                course.conclude_agreement(totals)
        for course in courses:
            course.write()

    def _totals(self, found: Sequence[Sums]) -> Sums:
        """What the parts of each tensor come to on this process, each tensor's sums in a part of their own."""
        begun = self._begun
        values = begun.floats(len(begun.table), found[0].values.shape[1], dtype=torch.float64)
        for course, sums in zip(self._courses, found):
            course.add_up(sums, values)
        every = numpy.ones(len(begun.table), dtype=numpy.int64)
        return Sums(values, begun.counts(("every tensor", len(every)), every).firsts)

    def _over_processes(
        self, values: Tensor, columns: Sequence[int], more_dimensions: int = 0
    ) -> Generator[dict[Stack, Answer], Mapping[Stack, Answer], None]:
        """Ask for some sums of each tensor, (tensors, 1) and so many more dimensions each, and put in the answers."""
        shape = (-1, 1, *[1] * more_dimensions)
        heard = yield {
            stack: [values[rows, column].reshape(shape) for column in columns] for stack, rows in self._stacks.items()
        }
        for stack, rows in self._stacks.items():
            for column, answer in zip(columns, heard[stack]):
                values[rows, column] = answer.flatten()

    # The scaled gradient ----------------------------------------------------------------------------------------

    def _of_scaled(self, stack: Stack, values: Tensor) -> Answer:
        """What is asked about the scaled gradients of a stack."""
        rows, dither = self._stacks[stack], stack.dither()
        asked = [values[rows, 0]] if self._config.came else []
        updated = self._due[stack]
        shown = None
        if any(isinstance(momentum, StoredLowRankOfShard) for _, momentum, _ in updated):
            shown = self._begun.floats(len(stack), stack.rows, stack.columns)
            for course in self._courses:
                course.show_scaled(rows, shown)
        for place, momentum, rate in updated:
            if isinstance(momentum, StoredLowRankOfShard):
                assert shown is not None
                self._seen[stack, place], summands = momentum.look(shown, rate, dither)
                asked += summands
            elif isinstance(momentum, StoredNibblesOfShard):
                asked.append(torch.stack([values[rows, column] for column in self._norm_columns(place)], dim=1))
            else:
                asked += momentum.summands(values, rate, dither)
        return asked

    def _take_in_scaled(self, stack: Stack, answer: Answer, values: Tensor) -> None:
        """The answer in the place of this process's sums; momenta of low rank follow."""
        rows, parts, factors = self._stacks[stack], iter(answer), None
        if self._config.came:
            squares = next(parts)
            values[rows, 0] = squares
            numel = stack.whole_rows * stack.columns
            factors = bounding_factor_(squares.sqrt().float(), numel, self._config.clip_threshold)
        for place, momentum, rate in self._due[stack]:
            own = [next(parts) for _ in range(momentum.summand_count)]
            if isinstance(momentum, StoredLowRankOfShard):
                seen = self._seen.pop((stack, place))
                seen = seen if factors is None else seen * factors.view(-1, 1, 1)
                momentum.follow(seen, own, factors, rate, stack.dither())
            elif isinstance(momentum, StoredNibblesOfShard):
                for column, total in zip(self._norm_columns(place), own[0].unbind(1)):
                    values[rows, column] = total

    def _norm_columns(self, place: int) -> tuple[int, int, int]:
        """Of the sums of a tensor, those that the norm of a new four-bit momentum follows from."""
        number = self._numbers[place]
        return 0, 1 + 2 * number, 2 + 2 * number

    # Columns ----------------------------------------------------------------------------------------------------

    def _columns(self) -> tuple[Columns, Columns]:
        """The sums of squares of the columns of momentum and drive, of all stacks."""
        begun = self._begun
        counts = self._column_counts()
        places = begun.counts((*(course.part.name for course in self._courses), "columns"), counts)
        both = Columns(places.firsts, begun.floats(places.count)), Columns(places.firsts, begun.floats(places.count))
        for course in self._courses:
            course.sum_columns(*both)
        return both

    def _columns_of(self, stack: Stack, values: Tensor) -> Tensor:
        """A stack's own of some numbers of columns, (tensors, 1, columns)."""
        start = int(self._column_counts()[: self._stacks[stack].start].sum())
        own = values[start : start + len(stack) * stack.columns]
        return own.view(len(stack), 1, stack.columns)

    def _column_counts(self) -> numpy.ndarray:
        """How many columns each tensor has of those that the stacks have."""
        members = numpy.any([course.part.members for course in self._courses], axis=0)
        counts: numpy.ndarray = self._begun.table[:, fields.COLUMNS] * members
        return counts


class QuestionsOfStack:
    """What a step of shards asks about one of its stacks; see `shared.Questions`."""

    def __init__(self, step: StepOfShards, stack: Stack) -> None:
        self.number = step.number
        self._step = step
        self._stack = stack

    def ask(self) -> Answer:
        """The next question."""
        return self._step.ask(self._stack)

    def hear(self, answer: Answer) -> None:
        """The answer to the last one."""
        self._step.hear(self._stack, answer)

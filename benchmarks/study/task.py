"""What is trained, and the loop that trains it: the same for every task and optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from library.automagic_cameamp import report_loss

Named = Sequence[tuple[str, torch.nn.Parameter]]
Build = Callable[[Named], torch.optim.Optimizer]

_MAX_GRAD_NORM = 1.0


class Task(Protocol):
    """A model with its data. Everything in it follows from its seed."""

    def named_parameters(self) -> Named:
        """What is trained."""

    def loss(self, number: int) -> Tensor:
        """The loss of a batch of the training data, 0-d."""

    def held_out_loss(self) -> float:
        """The loss on data that is never trained on; the same at every call but for the weights."""


class Course(NamedTuple):
    """What a run leaves.

    Attributes:
        losses: held-out loss every so many steps, and after the last one.
        step_seconds: median CPU time of a step of model and optimizer, without the held-out loss.
    """

    losses: list[float]
    step_seconds: float


def train(task: Task, build: Build, steps: int, every: int) -> Course:
    """Train once, with gradients clipped and the learning rate left as it is.

    Args:
        task: what to train.
        build: makes the optimizer.
        steps: how many steps.
        every: steps between two held-out losses.
    """
    named = task.named_parameters()
    optimizer = build(named)
    losses, seconds = [], []
    for step in range(1, steps + 1):
        started = time.process_time()
        loss = task.loss(step - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], _MAX_GRAD_NORM)
        report_loss(optimizer, loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - started)
        if step % every == 0 or step == steps:
            losses.append(task.held_out_loss())
    return Course(losses, statistics.median(seconds))

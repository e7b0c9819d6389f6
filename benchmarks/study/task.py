"""What is trained, and the loop that trains it: the same for every task and optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from library.automagic_cameamp import report_loss

Named = Sequence[tuple[str, torch.nn.Parameter]]
Build = Callable[[Named], torch.optim.Optimizer]

_MAX_GRAD_NORM = 1.0


class Task(Protocol):
    """A model with its data. Everything in it follows from its seed."""

    def named_parameters(self) -> Named:
        """The parameters that are trained, with their names."""

    def loss(self, number: int) -> Tensor:
        """The loss of a batch of the training data, 0-d."""

    def held_out_loss(self) -> float:
        """The loss on data that is never trained on. It depends on nothing except the weights."""


def train(task: Task, build: Build, steps: int, every: int) -> list[float]:
    """Train once, with gradients clipped and the learning rate left as it is.

    Args:
        task: what to train.
        build: makes the optimizer.
        steps: how many steps.
        every: steps between two held-out losses.

    Returns:
        The held-out losses, the last of them after the last step.
    """
    named = task.named_parameters()
    optimizer = build(named)
    losses = []
    for step in range(1, steps + 1):
        take_step(task, named, optimizer, step - 1)
        if step % every == 0 or step == steps:
            losses.append(task.held_out_loss())
    return losses


def take_step(task: Task, named: Named, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take one step of training on the batch of this number."""
    loss = task.loss(number)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in named], _MAX_GRAD_NORM)
    report_loss(optimizer, loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_seconds(runs: Mapping[str, tuple[Task, Build]], rounds: int) -> dict[str, float]:
    """CPU time of a step of model and optimizer: the median of some rounds, in which all take their steps in turns."""
    started = {}
    for name, (task, build) in runs.items():
        named = task.named_parameters()
        started[name] = (task, named, build(named))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, training in started.items():
            start = time.process_time()
            take_step(*training, number)
            if number >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}

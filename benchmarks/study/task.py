"""What is trained, and the loop that trains it: the same for every task and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from library.automagic_cameamp import report_loss

from .schedules import Schedule, constant

Named = Sequence[tuple[str, torch.nn.Parameter]]
Build = Callable[[Named], torch.optim.Optimizer]

# What goes wrong with the gradients of a step, by its number; and by how much the loss that is reported is larger.
Spoil = Callable[[int, Named], float]

_MAX_GRAD_NORM = 1.0


def as_they_are(number: int, named: Named) -> float:
    """Nothing goes wrong."""
    return 1.0


class Task(Protocol):
    """A model with its data. Everything in it follows from its seed."""

    def named_parameters(self) -> Named:
        """The parameters that are trained, with their names."""

    def loss(self, number: int) -> Tensor:
        """The loss of a batch of the training data, 0-d."""

    def held_out_loss(self) -> float:
        """The loss on data that is never trained on. It depends on nothing except the weights."""


def train(
    task: Task, build: Build, steps: int, every: int, schedule: Schedule = constant, spoil: Spoil = as_they_are
) -> list[float]:
    """Train once, with gradients clipped.

    Args:
        task: what to train.
        build: makes the optimizer.
        steps: how many steps.
        every: steps between two held-out losses.
        schedule: what the learning rate is multiplied by at each step.
        spoil: what goes wrong with the gradients.

    Returns:
        The held-out losses, the last of them after the last step.
    """
    named = task.named_parameters()
    optimizer = build(named)
    rates = [group["lr"] for group in optimizer.param_groups]
    if hasattr(optimizer, "train"):
        optimizer.train()
    losses = []
    for step in range(1, steps + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step - 1, steps)
        take_step(task, named, optimizer, step - 1, spoil)
        if step % every == 0 or step == steps:
            with _averaged(optimizer):
                losses.append(task.held_out_loss())
    return losses


@contextmanager
def _averaged(optimizer: Any) -> Iterator[None]:
    """Optimizers without a schedule average the weights, and show the average between `eval` and `train`."""
    averages = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if averages:
        optimizer.eval()
    yield
    if averages:
        optimizer.train()


def take_step(
    task: Task, named: Named, optimizer: torch.optim.Optimizer, number: int, spoil: Spoil = as_they_are
) -> None:
    """Take one step of training on the batch of this number."""
    loss = task.loss(number)
    loss.backward()
    larger = spoil(number, named)
    torch.nn.utils.clip_grad_norm_([p for _, p in named], _MAX_GRAD_NORM)
    report_loss(optimizer, loss * larger)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

"""The context of an optimizer whose kernels run on a CPU: the `Deciding` of `controller.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from .. import distributed
from . import cpu_kernels
from .controller import Pull, report_of
from .memory import FOLLOWED, HISTORIES, Memory


class ContextKernels:
    """Takes in what a step sees, and decides about the multiplier, in two calls each."""

    def update_context(
        self,
        memory: Memory,
        gradient: Tensor,
        loss: Tensor | None,
        lr: float,
        unusable: Tensor | None,
        start: float,
        threshold: float,
    ) -> Tensor:
        """As of `Deciding`."""
        values = memory.values
        newest, products = _compare(memory, "last_gradient", gradient, gradient, 0.0)
        found = numpy.concatenate([report_of(loss, unusable, gradient.device).numpy(), products[:3]])
        histories = [_with_room(values[name].numpy()) for name in HISTORIES]
        multiplier, confidence, is_edge_case, used = cpu_kernels.update_context(
            _average(found), _number(values["multiplier"]), lr, start, threshold, *histories
        )
        memory.samples["last_gradient"] = newest
        multiplier, confidence, used = _scalars([multiplier, confidence, used])
        values.update(zip(HISTORIES, map(torch.from_numpy, histories)))
        values.update(
            multiplier=multiplier, confidence=confidence, edge_cases=values["edge_cases"] + bool(is_edge_case)
        )
        return used

    def follow(
        self,
        memory: Memory,
        scaled_grad: Tensor,
        change: Tensor,
        pull: Pull,
        kept: float,
        threshold: float,
        highest: float,
    ) -> None:
        """As of `Deciding`."""
        values = memory.values
        newest, products = _compare(memory, "course", scaled_grad, change, kept)
        new = cpu_kernels.follow(
            _average(products),
            _number(values["multiplier"]),
            _number(values["confidence"]),
            _number(values["length"]),
            _number(values["lr_history"][-1]),
            _number(values["alignment_square"]),
            *pull,
            threshold,
            highest,
        )
        memory.samples["course"] = newest
        values.update(zip(FOLLOWED, _scalars(new)))


def _compare(memory: Memory, name: str, sample: Tensor, added: Tensor, kept: float) -> tuple[Tensor, numpy.ndarray]:
    """What is to be remembered next, and what the last sample has to do with another one."""
    last = memory.samples[name]
    if last is not None and last.shape != sample.shape:
        last = None
    newest = torch.empty(added.shape, dtype=torch.bfloat16, device="cpu")
    products = numpy.empty(4, dtype=numpy.float32)
    address = 0 if last is None else last.data_ptr()
    cpu_kernels.compare_samples(address, sample.numpy(), added.numpy(), kept, newest.data_ptr(), products)
    return newest, products


def _average(values: numpy.ndarray) -> numpy.ndarray:
    """As `distributed.average`."""
    mean: numpy.ndarray = distributed.average(torch.from_numpy(values)).numpy()
    return mean


def _with_room(history: numpy.ndarray) -> numpy.ndarray:
    """A history without its oldest value, and with room for a new one."""
    moved = numpy.empty_like(history)
    moved[:-1] = history[1:]
    return moved


def _number(value: Tensor) -> Any:
    return numpy.float32(value.item())


def _scalars(numbers: Sequence[float]) -> tuple[Tensor, ...]:
    return torch.from_numpy(numpy.array(numbers, dtype=numpy.float32)).unbind()

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
        found = distributed.average(torch.cat([report_of(loss, unusable, gradient.device), products[:3]]))
        histories = {name: torch.cat([values[name][1:], values[name][:1]]) for name in HISTORIES}
        new = cpu_kernels.update_context(
            found.numpy(), _number(values["multiplier"]), lr, start, threshold, *(h.numpy() for h in histories.values())
        )
        multiplier, confidence, used = _scalars([new[0], new[1], new[3]])
        memory.samples["last_gradient"] = newest
        values.update(
            histories, multiplier=multiplier, confidence=confidence, edge_cases=values["edge_cases"] + bool(new[2])
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
            distributed.average(products).numpy(),
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


def _compare(memory: Memory, name: str, sample: Tensor, added: Tensor, kept: float) -> tuple[Tensor, Tensor]:
    """What is to be remembered next, and what the last sample has to do with another one."""
    last = memory.samples[name]
    if last is not None and last.shape != sample.shape:
        last = None
    newest = torch.empty(added.shape, dtype=torch.bfloat16, device="cpu")
    products = torch.empty(4, dtype=torch.float32, device="cpu")
    address = 0 if last is None else last.data_ptr()
    cpu_kernels.compare_samples(address, sample.numpy(), added.numpy(), kept, newest.data_ptr(), products.numpy())
    return newest, products


def _number(value: Tensor) -> Any:
    return numpy.float32(value.item())


def _scalars(numbers: Sequence[float]) -> tuple[Tensor, ...]:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").unbind()

"""The context of an optimizer whose kernels run on a CPU: the `Deciding` of `controller.py`, in plain numbers.

There a number is read at once, and an operation of PyTorch takes longer than some of Python's or numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from .. import distributed
from . import controller, cpu_detection
from .controller import Pull
from .cpu_samples import compare_samples
from .memory import FOLLOWED, HISTORIES, Memory


class Numbers:
    """Takes in what a step sees, and decides about the multiplier."""

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
        report = [0.0 if loss is None else loss.item(), loss is not None, 0 if unusable is None else unusable.item()]
        newest, (*own, _) = _compare(memory, "last_gradient", gradient, gradient, 0.0)
        reported, reports, lost, *products = _average([*report, *own])
        mean_loss = reported / reports if reports > 0 else math.nan
        losses = _with_newest(values["loss_history"], mean_loss)
        cosines = _with_newest(values["gradient_history"], _cosine(products, absent=math.nan))
        is_broken = lost > 0 or (reports > 0 and not math.isfinite(mean_loss))
        confidence = 1.0 if is_broken else cpu_detection.confidence(losses, cosines)
        is_edge_case = _reaches(confidence, threshold)
        multiplier = values["multiplier"].item()
        multiplier = start if math.isnan(multiplier) else multiplier
        used = multiplier * controller.EDGE_SHARE if is_edge_case else multiplier
        rates = _with_newest(values["lr_history"], used * lr)
        memory.samples["last_gradient"] = newest
        values.update(zip(HISTORIES, map(torch.from_numpy, (losses, cosines, rates))))
        new_multiplier, new_confidence, factor = _scalars(multiplier, confidence, used)
        values.update(
            multiplier=new_multiplier, confidence=new_confidence, edge_cases=values["edge_cases"] + is_edge_case
        )
        return factor

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
        newest, found = _compare(memory, "course", scaled_grad, change, kept)
        *products, mean_square = _average(found)
        alignment, size = _cosine(products, absent=0.0), math.sqrt(mean_square)
        square = values["alignment_square"].item()
        square += pull.newest * (alignment * alignment - square)
        rate = values["lr_history"][-1].item()
        paced = square > 0 and (alignment > 0 or rate > controller.PACED_DOWN_FROM)
        strength = max(pull.pace / math.sqrt(square), pull.gain) if paced else pull.gain
        growth = math.exp(min(strength * alignment, controller.MOST_GROWTH))
        if _reaches(values["confidence"].item(), threshold):
            growth = min(growth, 1.0)
        before, ratio = values["length"].item(), 1.0
        length = size / rate if rate > 0 else math.inf  # A schedule may begin with a rate of 0.
        if not 0 < length < math.inf:
            length = before
        elif before > 0:
            ratio = before / length
        most = max(highest / length, controller.FLOOR) if length > 0 else math.inf
        multiplier = min(max(values["multiplier"].item() * growth * ratio, controller.FLOOR), most)
        memory.samples["course"] = newest
        values.update(zip(FOLLOWED, _scalars(multiplier, alignment, length, square)))


def _compare(memory: Memory, name: str, sample: Tensor, added: Tensor, kept: float) -> tuple[Tensor, list[float]]:
    """What is to be remembered next, and what the last sample has to do with another one; see `compare_samples`."""
    last = memory.samples[name]
    address = 0 if last is None or last.shape != sample.shape else last.data_ptr()
    newest = torch.empty(added.shape, dtype=torch.bfloat16, device="cpu")
    found = numpy.empty(4)
    compare_samples(address, sample.numpy(), added.numpy(), kept, newest.data_ptr(), found)
    return newest, found.tolist()


def _cosine(products: Sequence[float], absent: float) -> float:
    """The cosine of the two samples; `absent` where one of them is 0."""
    dot, x_square, y_square = products
    return dot / math.sqrt(x_square * y_square) if x_square > 0 and y_square > 0 else absent


def _reaches(confidence: float, threshold: float) -> bool:
    """Whether it is an edge case, in float32, as everything that is remembered."""
    return bool(numpy.float32(confidence) >= numpy.float32(threshold))


def _average(numbers: Sequence[float]) -> list[float]:
    """As `distributed.average`, in float32."""
    mean: list[float] = distributed.average(torch.from_numpy(_rounded(numbers))).tolist()
    return mean


def _with_newest(history: Tensor, value: float) -> numpy.ndarray:
    """A history with a new value in place of its oldest one."""
    return numpy.concatenate([history.numpy()[1:], _rounded([value])])


def _scalars(*numbers: float) -> tuple[Tensor, ...]:
    return torch.from_numpy(_rounded(numbers)).unbind()


def _rounded(numbers: Sequence[float]) -> numpy.ndarray:
    with numpy.errstate(over="ignore"):  # What float32 has no number for is infinite.
        return numpy.array(numbers, dtype=numpy.float32)

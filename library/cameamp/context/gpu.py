"""The context of an optimizer whose kernels run on a GPU: the `Deciding` of `controller.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distributed
from ..step.kernels.gpu.launching import Launcher, on
from . import gpu_kernels
from .controller import Pull
from .memory import FOLLOWED, HISTORIES, Memory

_SAMPLE_CHUNK, _SAMPLE_WARPS = 2048, 16
_WINDOW_CHUNK = 16


class ContextKernels:
    """Takes in what a step sees, and decides about the multiplier, on the device.

    Args:
        launcher: launches the kernels.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

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
        values, window = memory.values, memory.window
        found = self._compare(memory, "last_gradient", gradient, gradient, 0.0, loss, unusable)
        scalars = torch.empty(3, dtype=torch.float32, device=gradient.device)
        cases = torch.empty((), dtype=torch.int64, device=gradient.device)
        histories = torch.empty(len(HISTORIES), window, dtype=torch.float32, device=gradient.device).unbind()
        with on(gradient.device):
            self._launcher.launch(
                gpu_kernels.update_context, 1, found, values["multiplier"], values["edge_cases"],
                *(values[name] for name in HISTORIES), lr, start, threshold, scalars, cases, *histories, window,
                WIDTH=_power_of_two(window), CHUNK=_WINDOW_CHUNK,
            )  # fmt: skip
        values["multiplier"], values["confidence"], used = scalars.unbind()
        values["edge_cases"] = cases
        values.update(zip(HISTORIES, histories))
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
        found = self._compare(memory, "course", scaled_grad, change, kept, None, None)
        scalars = torch.empty(len(FOLLOWED), dtype=torch.float32, device=change.device)
        names = ("multiplier", "confidence", "length", "lr_history", "alignment_square")
        with on(change.device):
            self._launcher.launch(
                gpu_kernels.follow,
                1,
                found,
                *(values[name] for name in names),
                *pull,
                threshold,
                highest,
                scalars,
                memory.window,
            )
        values.update(zip(FOLLOWED, scalars.unbind()))

    def _compare(
        self,
        memory: Memory,
        name: str,
        sample: Tensor,
        added: Tensor,
        kept: float,
        loss: Tensor | None,
        lost: Tensor | None,
    ) -> Tensor:
        """What the last sample has to do with another one; `kept` of it and `added` are remembered."""
        last = memory.samples[name]
        begun = last is not None and last.shape == sample.shape
        before = last.view(torch.uint16) if last is not None and begun else None
        newest = torch.empty(added.shape, dtype=torch.bfloat16, device=added.device)
        found = torch.empty(gpu_kernels.NUMBERS, dtype=torch.float32, device=added.device)
        with on(added.device):
            self._launcher.launch(
                gpu_kernels.compare_samples, 1, found if before is None else before, sample,
                found if loss is None else loss, found if lost is None else lost, added, newest.view(torch.uint16),
                found, kept, len(sample), CHUNK=_SAMPLE_CHUNK, BEGUN=begun, HAS_LOSS=loss is not None,
                HAS_LOST=lost is not None, warps=_SAMPLE_WARPS,
            )  # fmt: skip
        memory.samples[name] = newest
        return distributed.average(found)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()

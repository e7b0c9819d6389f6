"""The law of the multiplier, one factor of all learning rates, and the histories that it follows from.

Nothing here is read back from the device while training: every value is a small tensor where the parameters are. The
documented calls turn one into a Python number, and that is what costs a read-back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import distributed
from ..devices import moved
from . import detection
from .memory import SAMPLES, Memory

# The multiplier starts where the largest learning rate is this, whatever the user wrote, and never falls below FLOOR.
SAFE_LR = 1e-6
FLOOR = 1e-9

# The offset is added only where the alignments of the last steps can be told from those of pure noise: where their sum,
# each step forgetting a tenth, is this many standard deviations from 0. Noise would otherwise carry the multiplier
# to its bound in a hundred steps.
EVIDENCE = 3.0
KEPT = 0.9

# The share of the multiplier that a step uses while an edge case lasts.
EDGE_SHARE = 0.5

SMALLEST_SQUARE = 1e-30


class Law(NamedTuple):
    """How the multiplier follows the alignment of the steps.

    Attributes:
        gain: change of the multiplier's logarithm at an alignment of 1, still to be multiplied by the adaptation rate.
        offset: what is added to the alignment, because a step that is best by itself is too short in the long run.
    """

    gain: float = 30.0
    offset: float = 0.02


STANDARD_LAW = Law()


class Deciding(Protocol):
    """What kernels of a device do in place of `update_context` and `follow`, in a launch or two.

    They put new tensors into the memory, and change none that is there.
    """

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
        """As `ContextualOptimizationModule.update_context`, of a multiplier that begins at `start`."""

    def follow(
        self,
        memory: Memory,
        scaled_grad: Tensor,
        change: Tensor,
        gain: float,
        offset: float,
        threshold: float,
        highest: float,
    ) -> None:
        """As `ContextualOptimizationModule.follow`, of a gain that has the adaptation rate in it."""


class ContextualOptimizationModule:
    """The context of one optimizer. The optimizer feeds it; everybody may read it, and reading changes nothing.

    Args:
        context_window: how many steps are remembered.
        edge_threshold: confidence at which a step counts as an edge case.
        adaptation_rate: how fast the multiplier follows the alignment of the steps.
        law: how the multiplier follows the alignment.
    """

    def __init__(
        self, context_window: int, edge_threshold: float, adaptation_rate: float, law: Law = STANDARD_LAW
    ) -> None:
        self._memory = Memory(context_window)
        self._threshold = edge_threshold
        self._rate = adaptation_rate
        self._law = law
        self._start, self._highest = 1.0, math.inf

    # What the optimizer reports ---------------------------------------------------------------------------------

    def set_bounds(self, largest_lr: float, max_lr: float) -> None:
        """Set the multiplier's bounds from the largest initial learning rate of a group and the highest allowed one."""
        self._start = min(1.0, SAFE_LR / largest_lr) if largest_lr > 0 else 1.0
        self._highest = max(max_lr / largest_lr, FLOOR) if largest_lr > 0 else 1.0

    def update_context(
        self,
        gradient: Tensor,
        loss: Tensor | float | None,
        lr: Tensor | float,
        unusable: Tensor | None = None,
        kernels: Deciding | None = None,
    ) -> Tensor:
        """Take in what is known before a step is taken.

        Args:
            gradient: the same sample of the gradient's elements at every step, 1-d.
            loss: loss of this step, a number or a tensor of one element; None where it is not known.
            lr: largest learning rate of a group at this step, before the multiplier.
            unusable: how many elements of the gradient were not finite, 0-d; None for none.
            kernels: what does this on the gradient's device; None for the operations below.

        Returns:
            The factor of this step's learning rates, as `multiplier` gives it.
        """
        self._memory.go_to(gradient.device)
        if kernels is not None:
            known = None if loss is None else as_scalar(loss, gradient.device)
            return kernels.update_context(
                self._memory, gradient, known, float(lr), unusable, self._start, self._threshold
            )
        report = report_of(loss, unusable, gradient.device)
        last = self._memory.sample_like("last_gradient", gradient)
        means = distributed.average(torch.cat([report, torch.stack(_products(last, gradient))]))
        return self.take_in(gradient, means[: len(report)], lr, means[len(report) :])

    def take_in(self, gradient: Tensor, report: Tensor, lr: Tensor | float, products: Tensor | None = None) -> Tensor:
        """As `update_context`, of what all processes agree on.

        Args:
            gradient: the sample.
            report: the mean of what `report_of` gives on each process.
            lr: as of `update_context`.
            products: the mean of `_products` of the last sample and this one; None if all processes have the same ones.
        """
        self._memory.go_to(gradient.device)
        if products is None:
            products = torch.stack(_products(self._memory.sample_like("last_gradient", gradient), gradient))
        values = self._memory.values
        values["multiplier"] = torch.where(values["multiplier"].isnan(), self._start, values["multiplier"])
        loss_share, reports, lost = report.unbind()
        mean_loss = loss_share / reports
        self._memory.remember("loss_history", mean_loss)
        self._memory.remember("gradient_history", _cosine(products.unbind(), absent=torch.nan))
        self._memory.samples["last_gradient"] = gradient.bfloat16()
        broken = (lost > 0) | ((reports > 0) & mean_loss.isfinite().logical_not())
        values["confidence"] = torch.where(
            broken, 1.0, detection.confidence(values["loss_history"], values["gradient_history"])
        )
        values["edge_cases"] = values["edge_cases"] + self._is_edge_case()
        multiplier = self.multiplier()
        self._memory.remember("lr_history", multiplier * lr)
        return multiplier

    def make_room(self, size: int, device: torch.device) -> None:
        """Remember samples of zeros, which are as good as none."""
        self._memory.go_to(device)
        self._memory.samples = {name: torch.zeros(size, dtype=torch.bfloat16, device=device) for name in SAMPLES}

    def go_back_to(self, memory: Memory) -> None:
        """Remember what `memory` does, which was `kept` before something failed."""
        self._memory = memory

    def kept(self) -> Memory:
        """What is remembered now."""
        return self._memory.kept()

    def multiplier(self) -> Tensor:
        """The factor of this step's learning rates, 0-d, on the device."""
        value = self._memory.values["multiplier"]
        begun = torch.where(value.isnan(), self._start, value)
        return torch.where(self._is_edge_case(), begun * EDGE_SHARE, begun)

    def follow(
        self, scaled_grad: Tensor, change: Tensor, of_all: bool = False, kernels: Deciding | None = None
    ) -> None:
        """Update the multiplier, for the next step, by how well this step's gradient agrees with the step before.

        Args:
            scaled_grad: sample of this step's scaled gradient, 1-d.
            change: sample of the step taken now, learning rate times update, 1-d.
            of_all: whether both are the same on all processes.
            kernels: as of `update_context`.
        """
        if kernels is not None:
            gain, law = self._law.gain * self._rate, self._law
            kernels.follow(self._memory, scaled_grad, change, gain, law.offset, self._threshold, self._highest)
            return
        values = self._memory.values
        last = self._memory.sample_like("last_change", change)
        # Replicas have the same gradients: a mean, because a sum would count each as evidence of its own.
        own = torch.stack(_products(last, scaled_grad))
        *products, of_squares = (own if of_all else distributed.average(own)).unbind()
        alignment = _cosine(products, absent=0.0)
        # The variance of a cosine of vectors whose signs have nothing to do with one another.
        variance = of_squares / (products[1] * products[2]).clamp_min(SMALLEST_SQUARE)
        total = values["alignment_sum"] * KEPT + alignment
        spread = values["alignment_variance"] * KEPT**2 + variance
        values["alignment_sum"], values["alignment_variance"] = total, spread
        offset = (total.square() > EVIDENCE**2 * spread).to(torch.float32) * self._law.offset
        begun = (last != 0).any()
        growth = torch.exp(self._law.gain * self._rate * (alignment + offset))
        growth = torch.where(begun, growth, 1.0)
        growth = torch.where(self._is_edge_case(), growth.clamp_max(1.0), growth)
        values["multiplier"] = (values["multiplier"] * growth).clamp(FLOOR, self._highest)
        values["alignment"] = alignment
        self._memory.samples["last_change"] = change.bfloat16()

    # What anybody may ask ---------------------------------------------------------------------------------------

    def detect_edge_case(self) -> bool:
        """Whether the newest step was an edge case: a spike or a rise of the loss, an oscillation, a broken number."""
        return bool(self._is_edge_case().item())

    def compute_contextual_lr_multiplier(self) -> float:
        """The factor of all learning rates at the next step, as long as that does not begin or end an edge case.

        `lr_history` has the learning rates of the steps already taken.
        """
        return float(self.multiplier().item())

    def compute_gradient_consistency(self) -> float:
        """Mean cosine of consecutive gradients over the window, -1 to 1; 1.0 before there are two gradients."""
        cosines = self.gradient_history
        return sum(cosines) / len(cosines) if cosines else 1.0

    def compute_update_alignment(self) -> float:
        """Cosine of the step before with the newest scaled gradient, -1 to 1; 0.0 before there are two steps.

        Positive: the gradient still points where the step went, which was too short. Negative: it overshot.
        """
        return float(self._memory.values["alignment"].item())

    def compute_loss_stability(self) -> float:
        """1 / (1 + spread / median) of the losses of the window, both robust: 1.0 for a steady loss, towards 0 else."""
        losses = [loss for loss in self.loss_history if math.isfinite(loss)]
        if len(losses) < 2:
            return 1.0
        center = abs(median(losses))
        spread = 1.4826 * median(abs(loss - median(losses)) for loss in losses)
        return center / (center + spread) if spread > 0 else 1.0

    @property
    def loss_history(self) -> list[float]:
        """The losses of the window, newest last; steps without a loss are left out."""
        return self._memory.history("loss_history")

    @property
    def gradient_history(self) -> list[float]:
        """The cosine of each step's gradient with the one before, newest last."""
        return self._memory.history("gradient_history")

    @property
    def lr_history(self) -> list[float]:
        """The largest learning rate of a group times the multiplier at each step, newest last."""
        return self._memory.history("lr_history")

    @property
    def edge_case_count(self) -> int:
        """How many edge cases there have been."""
        return int(self._memory.values["edge_cases"].item())

    def summary(self) -> dict[str, Tensor]:
        """Multiplier, consistency, alignment and number of edge cases, 0-d each, while still on the device."""
        consistency = self._memory.values["gradient_history"].nanmean()
        return {
            "multiplier": self.multiplier(),
            "consistency": torch.where(consistency.isnan(), 1.0, consistency),
            "alignment": self._memory.values["alignment"],
            "edge_cases": self._memory.values["edge_cases"],
        }

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs: tensors and numbers."""
        return self._memory.saved(self._start)

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Take over what `memory.check` found to be right; None: forget all steps."""
        if saved is None:
            self._memory.reset()
        else:
            self._memory.load(saved)

    # The inside -------------------------------------------------------------------------------------------------

    def _is_edge_case(self) -> Tensor:
        return self._memory.values["confidence"] >= self._threshold


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x.y, x.x, y.y, x^2.y^2) of two vectors, scaled so that no square leaves float32."""
    x, y = (v / v.abs().amax().clamp_min(1e-30) for v in (x, y))
    both = x * y
    return both.sum(), torch.dot(x, x), torch.dot(y, y), torch.dot(both, both)


def _cosine(products: Tensor | Sequence[Tensor], absent: float) -> Tensor:
    """The cosine of two vectors from what `_products` gave; `absent` where one of them is 0."""
    dot, x_square, y_square, *_ = products
    return torch.where((x_square > 0) & (y_square > 0), dot / (x_square * y_square).sqrt(), absent)


def report_of(loss: Tensor | float | None, unusable: Tensor | None, device: torch.device) -> Tensor:
    """What one process knows of a step: its loss or 0, whether there is one, and unusable elements; (3,) float32."""
    zero = torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack([
        zero if loss is None else as_scalar(loss, device),
        torch.full_like(zero, loss is not None),
        zero if unusable is None else unusable.to(zero.dtype),
    ])  # fmt: skip


def as_scalar(loss: Tensor | float, device: torch.device) -> Tensor:
    """A loss as a float32 tensor of no dimensions on a device, without waiting for it."""
    if isinstance(loss, Tensor):
        return moved(loss.detach(), device).float().mean()
    return torch.full((), float(loss), dtype=torch.float32, device=device)  # Filled there: a copy would wait.

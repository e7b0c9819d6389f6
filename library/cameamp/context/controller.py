"""The law of the multiplier, one factor of all learning rates, and the histories that it follows from.

Nothing here is read back from the device while training: every value is a small tensor where the parameters are. The
documented calls turn one into a Python number, and that is what costs a read-back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .. import distributed
from ..devices import moved
from ..techniques.adabelief import LONGEST
from . import detection
from .memory import SAMPLES, Memory

_Decision = TypeVar("_Decision")

# The multiplier starts where the largest learning rate is this, whatever the user wrote, and never falls below FLOOR.
SAFE_LR = 1e-6
FLOOR = 1e-9

# The pace takes no rate down but from above this, and so none further than where the multiplier starts. (A thousandth
# more: the multiplier times a learning rate is rounded.)
PACED_DOWN_FROM = 1.001 * SAFE_LR

# How far the multiplier may grow in one step, as a logarithm: the law sees what a rate does some steps later.
MOST_GROWTH = 0.6

# The share of the multiplier that a step uses while an edge case lasts.
EDGE_SHARE = 0.5


# After how many steps half of the haste is left, and nothing of the pace.
HASTY = 10
PACED = 40

# The least share of the newest alignment in their mean square.
_NEWEST = 0.1

# What a schedule's factor, 1 at its top, is above while it does not fall: factors are rounded.
_TOP = 1 - 1e-6


class Pull(NamedTuple):
    """How strongly the multiplier follows the alignment at one step.

    Attributes:
        gain: change of its logarithm at an alignment of 1.
        pace: the least that it changes at an alignment of the root mean square of the recent ones.
        newest: the share of the newest alignment in their mean square.
    """

    gain: float
    pace: float
    newest: float


class Law(NamedTuple):
    """How the multiplier follows the alignment of the course with the gradient.

    The course is the direction of the last steps: their sum, each in units of its own length, and each step forgets a
    part of it. Its cosine with the gradient has an
    upper fixed point: positive while the weights as a whole still descend, 0 where the steps of one rate undo one
    another as fast as they descend, negative where the rate is higher than that. (The hypergradient of Baydin et al.,
    arXiv 1703.04782, is the same with a course of one step, which is blind to any but the steepest directions.)

    A rate that is best for the next steps is too low for a schedule that falls (Wu et al., arXiv 1803.02021), which
    brings it down by itself, from a top that is best where the first hundred steps have it, however long the run is: so
    the multiplier then follows less and less, as estimates do in stochastic approximation.

    Attributes:
        gain: change of the multiplier's logarithm at an alignment of 1, still to be multiplied by the adaptation rate.
        kept: the share of the course that a step keeps. At first less: the course of t steps goes back 2 + t / 4 of
            them, because the steps before those were of much lower rates.
        freezing: the power of the schedule's factor, 1 at its top, that the gain is multiplied by, so that the
            multiplier finds the rate at the top and does not undo the schedule's fall.
        haste: how many times the gain is added to it at first, when the multiplier is far from where it belongs.
        settling: after t steps, below the schedule's top, the square of settling / (settling + t) is left of the gain.
        pace: the least change of the multiplier's logarithm at first, at an alignment of the root mean square of the
            recent ones, still to be multiplied by the adaptation rate. What noise leaves of the alignments is small
            where batches are, and the multiplier then has as far to go.
    """

    gain: float = 30.0
    kept: float = 0.97
    freezing: float = 3.0
    haste: float = 2.0
    settling: float = 60.0
    pace: float = 6.0

    def gain_at(self, steps: int, schedule: float) -> float:
        """The gain after some steps, where a schedule has a factor of 1 at its top."""
        gain = self.gain * (1 + self.haste * HASTY / (HASTY + steps)) * math.pow(schedule, self.freezing)
        if schedule <= _TOP:
            gain *= math.pow(self.settling / (self.settling + steps), 2)
        return gain

    def pull_at(self, steps: int, schedule: float, adaptation_rate: float) -> Pull:
        """What the multiplier follows by after some steps, where a schedule has a factor of 1 at its top."""
        pace = self.pace * max(1 - steps / PACED, 0.0) * math.pow(schedule, self.freezing)
        gain = self.gain_at(steps, schedule)
        return Pull(adaptation_rate * gain, adaptation_rate * pace, max(_NEWEST, 1 / max(steps, 1)))

    def kept_at(self, steps: int) -> float:
        """The share of the course that is kept after some steps."""
        return min(self.kept, 1 - 1 / (2 + steps / 4))


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
        pull: Pull,
        kept: float,
        threshold: float,
        highest: float,
    ) -> None:
        """As `ContextualOptimizationModule.follow`."""


class ContextualOptimizationModule:
    """The context of one optimizer. The optimizer feeds it; everybody may read it, and reading changes nothing.

    Args:
        context_window: how many steps are remembered.
        edge_threshold: confidence at which a step counts as an edge case.
        adaptation_rate: how fast the multiplier follows the alignment of the course.
        law: how the multiplier follows it.
    """

    def __init__(
        self, context_window: int, edge_threshold: float, adaptation_rate: float, law: Law = STANDARD_LAW
    ) -> None:
        self._memory = Memory(context_window)
        self._threshold = edge_threshold
        self._rate = adaptation_rate
        self._law = law
        self._start, self._highest, self._largest_lr = 1.0, math.inf, 0.0

    # What the optimizer reports ---------------------------------------------------------------------------------

    def set_bounds(self, largest_lr: float, max_lr: float) -> None:
        """Set the multiplier's bounds from the largest initial learning rate of a group and the highest allowed one.

        The multiplier may take steps as long as the longest that rules may take of the highest rate, and no longer.
        """
        self._start = min(1.0, SAFE_LR / largest_lr) if largest_lr > 0 else 1.0
        self._highest = max(LONGEST * max_lr / largest_lr, FLOOR) if largest_lr > 0 else 1.0
        self._largest_lr = largest_lr

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
        self._memory.see_schedule(float(lr) / self._largest_lr if self._largest_lr > 0 else 1.0)
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
        self._memory.see_schedule(float(lr) / self._largest_lr if self._largest_lr > 0 else 1.0)
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

    def multiplier(self) -> Tensor:
        """The factor of this step's learning rates, 0-d, on the device."""
        value = self._memory.values["multiplier"]
        begun = torch.where(value.isnan(), self._start, value)
        return torch.where(self._is_edge_case(), begun * EDGE_SHARE, begun)

    def follow(
        self, scaled_grad: Tensor, change: Tensor, of_all: bool = False, kernels: Deciding | None = None
    ) -> None:
        """Update the multiplier, for the next step, by how well this step's gradient agrees with the course.

            alignment  = cosine of the course and the scaled gradient
            strength   = max(gain, pace / root mean square of recent alignments)
            multiplier = multiplier * exp(strength * alignment) * length before / length
            course     = kept * course + change / its root mean square

        The length is the root mean square of the change, in units of the learning rate that the multiplier gave: what
        the multiplier finds is thereby the length of the steps, whatever the rules make of their unit. The pace
        makes the most of chance where there is nothing else, and so it takes no rate below the first. In the course
        all steps count alike: a sum of the changes themselves would not forget the long steps of a rate that was too
        high, and would bring it down for hundreds of steps after them.

        Args:
            scaled_grad: sample of this step's scaled gradient, 1-d.
            change: sample of the step taken now, learning rate times update, 1-d.
            of_all: whether both are the same on all processes.
            kernels: as of `update_context`.
        """
        memory, values = self._memory, self._memory.values
        pull = self._law.pull_at(memory.steps, memory.schedule, self._rate)
        kept = self._law.kept_at(memory.steps)
        memory.steps += 1
        if self._rate == 0:  # No length to keep to either.
            values["length"] = torch.zeros_like(values["length"])
        if kernels is not None:
            kernels.follow(memory, scaled_grad, change, pull, kept, self._threshold, self._highest)
            return
        course = memory.sample_like("course", change)
        # Replicas have the same gradients: a mean, because a sum would count each as evidence of its own.
        own = torch.stack([*_products(course, scaled_grad), change.square().mean()])
        *products, mean_square = (own if of_all else distributed.average(own)).unbind()
        alignment = _cosine(products, absent=0.0)
        square = values["alignment_square"].lerp(alignment.square(), pull.newest)
        rate = values["lr_history"][-1]
        paced = (square > 0) & ((alignment > 0) | (rate > PACED_DOWN_FROM))
        strength = torch.where(paced, pull.pace * square.rsqrt(), 0.0).clamp_min(pull.gain)
        growth = (strength * alignment).clamp_max(MOST_GROWTH).exp()
        growth = torch.where(self._is_edge_case(), growth.clamp_max(1.0), growth)
        size = mean_square.sqrt()
        length = size / rate
        before = values["length"]
        known = (length > 0) & (length < torch.inf)  # and not where the learning rate is 0, as a schedule may begin
        ratio = torch.where(known & (before > 0), before / length, 1.0)
        length = torch.where(known, length, before)
        # Where nothing has moved yet there is no bound, and nothing grows either.
        highest = (self._highest / length).clamp_min(FLOOR)
        values["multiplier"] = (values["multiplier"] * growth * ratio).clamp_min(FLOOR).minimum(highest)
        values["length"] = length
        values["alignment"], values["alignment_square"] = alignment, square
        direction = torch.where(size > 0, change / size, 0.0)
        memory.samples["course"] = course.mul_(kept).add_(direction).bfloat16()

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
        """Cosine of the course of the last steps with the newest scaled gradient, -1 to 1; 0.0 before two steps.

        Positive: the gradient still points where the steps went, which were too short. Negative: they overshot.
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


def attempted(module: ContextualOptimizationModule, decide: Callable[[], _Decision]) -> _Decision:
    """What `decide` returns; if it fails, the module remembers what it did before."""
    before = module._memory.kept()
    try:
        return decide()
    except Exception:
        module._memory = before
        raise


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x.y, x.x, y.y) of two vectors, scaled so that no square leaves float32."""
    x, y = (v / v.abs().amax().clamp_min(1e-30) for v in (x, y))
    return torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)


def _cosine(products: Tensor | Sequence[Tensor], absent: float) -> Tensor:
    """The cosine of two vectors from what `_products` gave; `absent` where one of them is 0."""
    dot, x_square, y_square = products
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

"""The first pass over gradients: refuse what no rule can use, count what is not finite, and measure the group."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import moved
from ..stacks.stack import Stack
from ..techniques import agr, weight_decay

# The square of a larger magnitude overflows float32.
LARGEST_MAGNITUDE = 1e18


class Magnitudes(NamedTuple):
    """What is measured of each tensor of one stack; (tensors,) unless noted.

    abs_sums: sum of |g|.
    nonzero_count: how many elements of all tensors are not 0, 0-d.
    deviations: sum of squared deviations of |g| from the tensor's mean; None where not asked for.
    """

    abs_sums: Tensor
    nonzero_count: Tensor
    deviations: Tensor | None


class FirstPass(NamedTuple):
    """What a first pass over a stack of gradients finds.

    magnitudes: of the usable elements.
    unusable: how many elements are not, 0-d.
    watched: every n-th element of each tensor, (tensors, elements); None where nobody watches.
    """

    magnitudes: Magnitudes
    unusable: Tensor
    watched: Tensor | None


@dataclass(frozen=True)
class GroupSums:
    """What the rules need to know of a group's gradients as a whole.

    Attributes:
        magnitude: 0-d, AGR's sum of |g|; on the first stack's device.
        decay_strengths: for each stack, the strength of the weight decay of its tensors; None if nothing decays.
    """

    magnitude: Tensor
    decay_strengths: list[Tensor] | list[None]

    @classmethod
    def of(cls, stacks: Sequence[Stack], measured: Sequence[Magnitudes], before: Tensor | None = None) -> GroupSums:
        """Over the stacks of a group, whichever devices they are on.

        Args:
            stacks: the stacks.
            measured: what was measured of each.
            before: from `summary` in the step before, if these stacks are not the whole group.
        """
        if before is not None:
            return cls._with(before, stacks, measured)
        device = measured[0].abs_sums.device
        abs_sums, nonzero = _sums_and_counts(measured)
        magnitude = agr.magnitude_sum(abs_sums, nonzero)
        deviations = [m.deviations.to(device) for m in measured if m.deviations is not None]
        if not deviations:
            return cls(magnitude, [None] * len(stacks))
        counts = element_counts(stacks, device)
        strengths = weight_decay.decay_strengths(abs_sums / counts, torch.cat(deviations), counts)
        parts = strengths.split([len(stack) for stack in stacks])
        return cls(magnitude, [part.to(stack.device) for part, stack in zip(parts, stacks)])

    @classmethod
    def _with(cls, before: Tensor, stacks: Sequence[Stack], measured: Sequence[Magnitudes]) -> GroupSums:
        total, nonzero, mean, variance = moved(before, measured[0].abs_sums.device).unbind()
        abs_sums, counted = _sums_and_counts(measured)
        # At least each parameter's own: gradients that have grown a thousandfold would change their signs otherwise.
        magnitude = agr.magnitude_sum(torch.maximum(abs_sums.amax(), total), torch.maximum(counted.amax(), nonzero))
        if measured[0].deviations is None:
            return cls(magnitude, [None] * len(stacks))
        strengths = [
            weight_decay.strengths_within(
                each.abs_sums / (stack.rows * stack.columns),
                *(moved(x, each.abs_sums.device) for x in (mean, variance)),
            )
            for stack, each in zip(stacks, measured)
        ]
        return cls(magnitude, strengths)


def summary(stacks: Sequence[Stack], measured: Sequence[Magnitudes]) -> Tensor:
    """Sum, count of elements other than 0, mean and variance of |g| over stacks: (4,) float32, where the first is."""
    abs_sums, nonzero = _sums_and_counts(measured)
    counts = element_counts(stacks, abs_sums.device)
    spread = weight_decay.mean_and_variance(abs_sums / counts, _deviations(measured, abs_sums), counts)
    return torch.stack([abs_sums.sum(), nonzero.sum().to(abs_sums.dtype), *spread])


def _sums_and_counts(measured: Sequence[Magnitudes]) -> tuple[Tensor, Tensor]:
    """Sums of |g|, (tensors,), and counts of elements other than 0, (stacks,), where the first stack is."""
    device = measured[0].abs_sums.device
    abs_sums = _together((each.abs_sums for each in measured), device)
    return abs_sums, _together((each.nonzero_count.view(1) for each in measured), device)


def _deviations(measured: Sequence[Magnitudes], abs_sums: Tensor) -> Tensor:
    """Those of all tensors. Unknown ones count as 0: they are known as long as they matter, in the early phase."""
    if all(each.deviations is None for each in measured):
        return torch.zeros_like(abs_sums)
    parts = (torch.zeros_like(each.abs_sums) if each.deviations is None else each.deviations for each in measured)
    return _together(parts, abs_sums.device)


def _together(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.to(device) for part in parts])


def element_counts(stacks: Sequence[Stack], device: torch.device) -> Tensor:
    """How many elements each tensor of some stacks has, float32 (tensors,) on a device."""
    counts = [float(stack.whole_rows * stack.columns) for stack in stacks for _ in stack.params]
    return moved(torch.tensor(counts, dtype=torch.float32, device="cpu"), device)


def with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that take a step: those with elements and a gradient.

    Raises:
        RuntimeError: a gradient is one that no rule here can use; with its parameter's shape.
    """
    active = [p for p in params if p.grad is not None and p.numel() > 0]
    kinds = {(grad.layout, grad.dtype) for p in active if (grad := p.grad) is not None}
    if all(layout == torch.strided and not dtype.is_complex for layout, dtype in kinds):
        return active
    for p in active:
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; only dense gradients are supported"
            )
        if grad.is_complex():
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is complex; only real gradients are supported"
            )
    return active


def tally(tallies: dict[torch.device, Tensor], counts: Sequence[Tensor]) -> None:
    """Add counts of unusable elements to a tally for each device."""
    for device in {count.device for count in counts}:
        own = [count for count in counts if count.device == device]
        # float32 would lose count at 2^24, which a few steps of nothing but NaN reach.
        more = torch.stack(own).sum(dtype=torch.int64) if len(own) > 1 else own[0].to(torch.int64)
        tallies[device] = tallies[device] + more if device in tallies else more


def warn_of_none(params: Iterable[Tensor]) -> None:
    """Warn that no parameter has a gradient, where some should have one: such a step would do nothing, silently."""
    if any(p.requires_grad and p.numel() > 0 for p in params):
        warnings.warn(
            "no parameter of this optimizer has a gradient at its first step, so nothing is trained. A wrapper that "
            "replaces a model's parameters (FSDP, fully_shard) leaves the optimizer with the old ones: build the "
            "optimizer after that",
            stacklevel=2,
        )


def first_pass(
    g: Tensor, with_deviations: bool, watch_every: int = 0, scratch: Tensor | None = None, watch_from: int = 0
) -> FirstPass:
    """Measure a stack of gradients.

    Args:
        g: the gradients, (tensors, rows, columns) float32; those that are not usable become 0.
        with_deviations: whether to measure deviations.
        watch_every: distance between the elements to return; 0 for none.
        scratch: memory to compute in, of g's shape; allocated where None.
        watch_from: the first element to return.
    """
    unusable = drop_unusable_(g, scratch)
    count = unusable.ne_(0).sum()  # 1 for NaN too
    magnitudes = _measure(g, with_deviations, scratch=unusable)
    return FirstPass(magnitudes, count, at_every_nth(g, watch_every, watch_from).clone() if watch_every else None)


def at_every_nth(stack: Tensor, n: int, first: int = 0) -> Tensor:
    """Every n-th element of each tensor of a stack, from a first one on: (tensors, elements), a view."""
    return stack.flatten(1)[:, first::n]


def drop_unusable_(g: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Set every element of `g` that is not finite, or above 1e18 in magnitude, to 0.

    Args:
        g: gradients; updated.
        scratch: memory for the result, of g's shape; allocated where None.

    Returns:
        A tensor of g's shape: 0 for usable elements, and something else for the others.
    """
    # hardshrink keeps what lies outside its bounds, NaN too. Comparing and selecting by a bool mask does the same at
    # four times the cost on a CPU.
    unusable = torch.hardshrink(g, LARGEST_MAGNITUDE, out=scratch)
    g.sub_(unusable).nan_to_num_(0.0, 0.0, 0.0)
    return unusable


def _measure(g: Tensor, with_deviations: bool, scratch: Tensor) -> Magnitudes:
    """Magnitudes of a stack of usable gradients.

    Args:
        g: the gradients, (tensors, rows, columns).
        with_deviations: whether to measure deviations.
        scratch: a tensor of g's shape to compute in.
    """
    magnitude = torch.abs(g, out=scratch).flatten(1)
    abs_sums = magnitude.sum(dim=1)
    deviations = None
    if with_deviations:
        means = abs_sums / magnitude.shape[1]
        deviations = magnitude.sub_(means.unsqueeze(1)).square_().sum(dim=1)
    ones = torch.ne(magnitude if deviations is None else g.flatten(1), 0, out=magnitude)
    return Magnitudes(abs_sums, ones.sum(), deviations)

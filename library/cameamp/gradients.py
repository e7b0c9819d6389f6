"""What is done to gradients before any rule sees them: refuse what cannot be used, and measure the group."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# The square of a larger magnitude overflows float32.
LARGEST_MAGNITUDE = 1e18


class Magnitudes(NamedTuple):
    """Of each tensor of one stack, (tensors,).

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


def check(p: Tensor) -> None:
    """Raise RuntimeError for a gradient that no rule here can use, naming the parameter's shape."""
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


def check_whole(p: Tensor) -> None:
    """Raise RuntimeError for a parameter of which this process holds a part: a DTensor, or one that FSDP flattened."""
    if hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} is sharded over processes (FSDP, DTensor); these optimizers need "
            "whole parameters, because sums over a parameter and over its group decide a step. Supported: one process, "
            "and DDP with any number, where every process holds every parameter"
        )


def warn_of_none(params: Iterable[Tensor]) -> None:
    """Warn that no parameter has a gradient, where some should have one: such a step would do nothing, silently."""
    if any(p.requires_grad and p.numel() > 0 for p in params):
        warnings.warn(
            "no parameter of this optimizer has a gradient at its first step, so nothing is trained. A wrapper that "
            "replaces a model's parameters (FSDP, fully_shard) leaves the optimizer with the old ones: build the "
            "optimizer after that",
            stacklevel=2,
        )


def first_pass(g: Tensor, with_deviations: bool, watch_every: int = 0, scratch: Tensor | None = None) -> FirstPass:
    """Measure a stack of gradients.

    Args:
        g: the gradients, (tensors, rows, columns) float32; those that are not usable become 0.
        with_deviations: whether to measure deviations.
        watch_every: distance between the elements to return; 0 for none.
        scratch: memory to compute in, of g's shape; allocated where None.
    """
    unusable = drop_unusable_(g, scratch)
    count = _count_in_graph(unusable) if torch.compiler.is_compiling() else unusable.ne_(0).sum()  # 1 for NaN too
    magnitudes = _measure(g, with_deviations, scratch=unusable)
    return FirstPass(magnitudes, count, at_every_nth(g, watch_every).clone() if watch_every else None)


def at_every_nth(stack: Tensor, n: int) -> Tensor:
    """Every n-th element of each tensor of a stack, from the first one on: (tensors, elements), a view."""
    return stack.flatten(1)[:, ::n]


def drop_unusable_(g: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Set every element of `g` that is not finite, or above 1e18 in magnitude, to 0.

    Args:
        g: gradients; updated.
        scratch: memory for the result, of g's shape; allocated where None.

    Returns:
        A tensor of g's shape: 0 for usable elements, and something else for the others.
    """
    if torch.compiler.is_compiling():
        usable = g.abs() <= LARGEST_MAGNITUDE  # false for NaN
        g.copy_(torch.where(usable, g, 0.0))
        return ~usable
    # hardshrink keeps what lies outside its bounds, NaN too. Comparing and selecting by a bool mask does the same at
    # four times the cost on a CPU, outside of a graph.
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
    compiling = torch.compiler.is_compiling()
    magnitude = torch.abs(g, out=None if compiling else scratch).flatten(1)
    abs_sums = magnitude.sum(dim=1)
    deviations = None
    if with_deviations:
        means = abs_sums / magnitude.shape[1]
        deviations = magnitude.sub_(means.unsqueeze(1)).square_().sum(dim=1)
    if compiling:
        return Magnitudes(abs_sums, _count_in_graph(g), deviations)
    ones = torch.ne(magnitude if deviations is None else g.flatten(1), 0, out=magnitude)
    return Magnitudes(abs_sums, ones.sum(), deviations)


def _count_in_graph(stack: Tensor) -> Tensor:
    """How many elements are not 0; by sums over the same dimension as others, which a graph makes in one loop."""
    return (stack != 0).flatten(1).sum(dim=1).sum()

"""Is training in trouble? Three tests on the recent losses and gradient directions, as p-values.

A p-value is the probability of seeing as much by chance on a run that goes on as before: uniform between 0 and 1 on
pure noise, so that a test at level 0.01 raises a false alarm in 1 % of the steps. The losses may be Gaussian or
log-normal, and a window of any length is allowed for.

Windows are of shape (..., window), newest last, NaN where nothing was observed, and all results of shape (...). Nothing
is read back from the device, where each of these small operations is a launch: what the tests share is done once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Fewer entries say nothing at the levels that are asked for.
FEWEST_LOSSES = 10
FEWEST_COSINES = 4

# Directions are tested over the newest entries alone: an oscillation must be met within ten steps.
RECENT_COSINES = 8

# A Gaussian's standard deviation is this many median absolute deviations.
DEVIATIONS_PER_MAD = 1.4826
# Estimated that way it is as uncertain as the usual estimate from only this share of the values.
MAD_EFFICIENCY = 0.37


class Statistic(NamedTuple):
    """What a test has found, each (...).

    Attributes:
        t: distributed as Student's t where training goes on as before, large where it does not.
        freedom: its degrees of freedom.
        enough: whether there was enough to test, bool.
    """

    t: Tensor
    freedom: Tensor
    enough: Tensor


def confidence(losses: Tensor, cosines: Tensor) -> Tensor:
    """How sure one can be that not all of the tests alarm by chance, (...).

    Args:
        losses: windows of losses; those that are not finite are left out.
        cosines: windows of the cosines of consecutive gradients.

    Returns:
        On noise it reaches c in at most 1 - c of the cases, however many tests had something to test.
    """
    losses = losses + (losses - losses)  # NaN where not finite
    p = p_values((spike(losses), rising(losses), oscillating(cosines)))
    tests = (p < 1).sum(dim=-1).clamp_min(1)  # With none, 0 * log 0 would be NaN; it is no confidence at all.
    return torch.exp(tests * torch.log1p(-p.amin(dim=-1)))


def p_values(found: Sequence[Statistic]) -> Tensor:
    """(..., tests): 1 for a test that had too little to test.

    By Wallace's normal approximation of Student's t (1959), within a few percent for 3 degrees of freedom or more.
    """
    t, freedom, enough = (torch.stack(parts, dim=-1) for parts in zip(*found))
    size = (freedom * torch.log1p(t * t / freedom)).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    p = 0.5 * torch.erfc(torch.sign(t) * size / math.sqrt(2))
    return torch.where(enough & (p == p), p, 1.0)  # not NaN


def spike(losses: Tensor) -> Statistic:
    """The newest loss lies above the others: its robust z-score against their median and median absolute deviation.

    Losses are compared on the scale where their noise is closest to Gaussian: logarithms, where all are positive.
    """
    positive = losses.nan_to_num(1.0).amin(dim=-1, keepdim=True) > 0
    values = torch.where(positive, losses.clamp_min(torch.finfo(losses.dtype).tiny).log(), losses)
    newest, others = values[..., -1], values[..., :-1]
    count = _count(others)
    middle = ((count.unsqueeze(-1) - 1).clamp_min(0) / 2).long()
    median = _in_order(others, middle)
    spread = _in_order((others - median).abs(), middle).squeeze(-1) * DEVIATIONS_PER_MAD
    median, size = median.squeeze(-1), median.abs()
    # The median is itself uncertain, by a variance of pi / 2n.
    rounding = torch.where(positive, size.clamp_min(1.0), size).squeeze(-1) * 1e-6 + 1e-12
    t = (newest - median) / (spread * (1 + math.pi / 2 / count).sqrt()).clamp_min(rounding)
    return Statistic(t, MAD_EFFICIENCY * count, (count >= FEWEST_LOSSES) & (newest == newest))


def rising(losses: Tensor) -> Statistic:
    """The losses rise over the window: Spearman's rank correlation with time, one-sided.

    Ranks make it exact for any distribution, and a few wild losses do not decide.
    """
    there = losses == losses
    known = there.to(losses.dtype)
    count = known.sum(dim=-1, keepdim=True)
    values = losses.nan_to_num(torch.inf)
    ordered = values.sort(dim=-1).values
    # Twice the rank less 1, whose mean is the count; of equal losses the mean rank.
    ranks = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    x = (there.cumsum(dim=-1) - (count + 1) / 2) * known  # Deterministic training refuses cumsum of floats.
    y = (ranks - count) * known
    scale = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    r = (x * y).sum(dim=-1) / scale.clamp_min(1e-12)
    count = count.squeeze(-1)
    freedom = (count - 2).clamp_min(1)
    return Statistic(r * (freedom / (1 - r * r).clamp_min(1e-7)).sqrt(), freedom, count >= FEWEST_LOSSES)


def oscillating(cosines: Tensor) -> Statistic:
    """Consecutive gradients point against one another: a t-test that the mean of their recent cosines is below 0."""
    recent = cosines[..., -RECENT_COSINES:]
    count = _count(recent)
    at_least_one = count.clamp_min(1)
    mean = recent.nansum(dim=-1) / at_least_one
    squares = (recent - mean.unsqueeze(-1)).square().nansum(dim=-1)
    freedom = (count - 1).clamp_min(1)
    error = (squares / freedom / at_least_one).sqrt().clamp_min(1e-7)
    return Statistic(-mean / error, freedom, count >= FEWEST_COSINES)


def _count(window: Tensor) -> Tensor:
    """How many entries are known, in the window's dtype: quotients of whole numbers would be of the default one."""
    return (window == window).sum(dim=-1, dtype=window.dtype)


def _in_order(values: Tensor, place: Tensor) -> Tensor:
    """The entry at a place in ascending order, not counting NaN, (..., 1); NaN if there is none.

    In the middle it is the lower median. Deterministic training refuses torch.nanmedian.
    """
    return values.sort(dim=-1).values.gather(-1, place)

"""Is training in trouble? Three tests on the recent losses and gradient directions, as p-values.

A p-value is the probability of seeing as much by chance on a run that goes on as before: even between 0 and 1 on pure
noise, so that a test at level 0.01 alarms falsely in 1 % of the steps. The losses may be Gaussian or log-normal, and a
window of any length is allowed for.

All functions take windows of shape (..., window), newest last, NaN where nothing was observed, and return p-values of
shape (...); 1 where there is too little to test. Nothing is read back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Fewer entries say nothing at the levels that are asked for.
FEWEST_LOSSES = 10
FEWEST_COSINES = 4

# Directions are tested over the newest entries alone: an oscillation must be met within ten steps.
RECENT_COSINES = 8

# A Gaussian's standard deviation is this many median absolute deviations,
_DEVIATIONS_PER_MAD = 1.4826
# and a standard deviation estimated so is as uncertain as one of 0.37 times as many values estimated as usual.
_MAD_EFFICIENCY = 0.37


def combined_confidence(p_values: Tensor) -> Tensor:
    """How sure one can be that not all of some tests alarm by chance.

    Args:
        p_values: (..., tests); 1 for a test that had nothing to test.

    Returns:
        (...): on noise it reaches c in at most 1 - c of the cases, however many tests there are.
    """
    tests = (p_values < 1).sum(dim=-1).clamp_min(1)  # With none, 0 * log 0 would be NaN; it is no confidence at all.
    return torch.exp(tests * torch.log1p(-p_values.amin(dim=-1)))


def spike(losses: Tensor) -> Tensor:
    """The newest loss lies above the others: its robust z-score against their median and median absolute deviation."""
    values, in_logarithms = _even_noise(losses)
    newest, others = values[..., -1], values[..., :-1]
    count = _count(others.isfinite(), losses)
    median = _median(others, count)
    spread = _median((others - median.unsqueeze(-1)).abs(), count) * _DEVIATIONS_PER_MAD
    # The median is itself uncertain, by a variance of pi / 2n.
    rounding = torch.where(in_logarithms, median.abs().clamp_min(1.0), median.abs()) * 1e-6 + 1e-12
    t = (newest - median) / (spread * (1 + math.pi / 2 / count).sqrt()).clamp_min(rounding)
    return _upper_tail(t, _MAD_EFFICIENCY * count, (count >= FEWEST_LOSSES) & newest.isfinite())


def rising(losses: Tensor) -> Tensor:
    """The losses rise over the window: Spearman's rank correlation with time, one-sided.

    Ranks make it exact for any distribution, and a few wild losses do not decide.
    """
    known = losses.isfinite()
    count = _count(known, losses)
    times = known.cumsum(dim=-1).to(losses.dtype)
    values = torch.where(known, losses, torch.inf)
    ordered = values.sort(dim=-1).values
    ranks = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    r = _correlation(times, ranks.to(losses.dtype), known)
    freedom = (count - 2).clamp_min(1)
    t = r * (freedom / (1 - r * r).clamp_min(1e-7)).sqrt()
    return _upper_tail(t, freedom, count >= FEWEST_LOSSES)


def oscillating(cosines: Tensor) -> Tensor:
    """Consecutive gradients point against one another: a t-test that the mean of their recent cosines is below 0."""
    recent = cosines[..., -RECENT_COSINES:]
    known = recent.isfinite()
    count = _count(known, cosines)
    mean = recent.nansum(dim=-1) / count.clamp_min(1)
    squares = torch.where(known, recent - mean.unsqueeze(-1), 0.0).square().sum(dim=-1)
    freedom = (count - 1).clamp_min(1)
    error = (squares / freedom / count.clamp_min(1)).sqrt()
    return _upper_tail(-mean / error.clamp_min(1e-7), freedom, count >= FEWEST_COSINES)


def _even_noise(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Losses on the scale where their noise is closest to Gaussian: logarithms, where all are positive.

    Returns:
        The values, and which windows are of logarithms, (...).
    """
    known = losses.isfinite()
    positive = torch.where(known, losses, 1.0).amin(dim=-1, keepdim=True) > 0
    values = torch.where(positive, losses.clamp_min(torch.finfo(losses.dtype).tiny).log(), losses)
    return torch.where(known, values, torch.nan), positive.squeeze(-1)


def _count(known: Tensor, window: Tensor) -> Tensor:
    """How many entries are known, in the window's dtype: quotients of whole numbers would be of the default one."""
    return known.sum(dim=-1, dtype=window.dtype)


def _median(values: Tensor, count: Tensor) -> Tensor:
    """The lower median of the `count` entries that are not NaN. Deterministic training refuses torch.nanmedian."""
    middle = (count.long() - 1).clamp_min(0) // 2
    return values.sort(dim=-1).values.gather(-1, middle.unsqueeze(-1)).squeeze(-1)


def _correlation(x: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """Pearson's correlation over the known entries; 0 where one of the two does not vary."""
    count = known.sum(dim=-1, keepdim=True).clamp_min(1)
    x, y = (torch.where(known, v, 0.0) for v in (x, y))
    x, y = (torch.where(known, v - v.sum(dim=-1, keepdim=True) / count, 0.0) for v in (x, y))
    scale = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    return (x * y).sum(dim=-1) / scale.clamp_min(1e-12)


def _upper_tail(t: Tensor, freedom: Tensor, enough: Tensor) -> Tensor:
    """p-value of Student's t: by Wallace's normal approximation (1959), within a few percent for 3 degrees or more."""
    size = (freedom * torch.log1p(t * t / freedom)).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    p = 0.5 * torch.erfc(torch.sign(t) * size / math.sqrt(2))
    return torch.where(enough & p.isnan().logical_not(), p, 1.0)

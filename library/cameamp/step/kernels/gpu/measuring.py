"""The first pass over gradients, and what follows from it for the whole group; as `measure.py` and its techniques.

Each program sums up a span of one tensor, and a kernel of its own adds up the spans in their order, so that the same
gradients give the same sums to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....techniques import weight_decay
from .elements import FIELDS, NUMEL, elements_of, gradient, is_usable, seen_by_context, size_of

# What is known of a span, and then of a tensor.
MEASURES = 4
_MEASURES = tl.constexpr(MEASURES)
ABS_SUM, NONZERO, UNUSABLE, DEVIATIONS = range(4)
_ABS_SUM, _NONZERO = tl.constexpr(ABS_SUM), tl.constexpr(NONZERO)
_UNUSABLE, _DEVIATIONS = tl.constexpr(UNUSABLE), tl.constexpr(DEVIATIONS)

_ALPHA, _SATURATION = tl.constexpr(weight_decay.ALPHA), tl.constexpr(weight_decay.SATURATION)


@triton.jit
def place_of(work):
    """The tensor that this program works on, and which of its parts."""
    program = tl.program_id(0)
    return tl.load(work + 2 * program), tl.load(work + 2 * program + 1)


@triton.jit(do_not_specialize=["every"])
def measure_spans(table, work, firsts, partials, sample, every, SPAN: tl.constexpr, RULES: tl.constexpr):
    """Of one span: sum |g|, how many elements are not 0, how many are unusable, and their deviations.

    Args:
        table: a row for each tensor.
        work: for each program its tensor and its span.
        firsts: for each tensor the number of its first span.
        partials: (spans, MEASURES) float32, to be filled.
        sample: what a context sees of the gradients, every `every`-th element, to be filled.
    """
    tensor, span = place_of(work)
    row = table + tensor * FIELDS
    offsets, mask = elements_of(row, span, SPAN, RULES)
    g = gradient(row, offsets, mask, RULES)
    usable = is_usable(g)
    g = tl.where(usable, g, 0.0)
    magnitude = tl.abs(g)
    total = tl.sum(magnitude, axis=0)
    found = partials + (tl.load(firsts + tensor) + span) * _MEASURES
    tl.store(found + _ABS_SUM, total)
    tl.store(found + _NONZERO, tl.sum((magnitude > 0).to(tl.float32), axis=0))
    tl.store(found + _UNUSABLE, tl.sum((usable == 0).to(tl.float32), axis=0))
    if RULES.decays:
        mean = total / tl.minimum(size_of(row, RULES) - span * SPAN, SPAN).to(tl.float32)
        apart = tl.where(mask, magnitude - mean, 0.0)
        tl.store(found + _DEVIATIONS, tl.sum(apart * apart, axis=0))
    if RULES.watched:
        place, seen = seen_by_context(row, offsets, mask, every, RULES)
        tl.store(sample + place, g, seen)


@triton.jit
def measure_tensor(table, firsts, partials, found, SPAN: tl.constexpr, CHUNK: tl.constexpr, DECAYS: tl.constexpr):
    """Of one tensor what its spans have found, as float64; deviations by Chan's rule."""
    tensor = tl.program_id(0)
    numel = tl.load(table + tensor * FIELDS + NUMEL).to(tl.int32)
    first, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    sums, nonzero, unusable = _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK)
    for start in range(first, end, CHUNK):
        spans = start + tl.arange(0, CHUNK)
        there = partials + spans * _MEASURES
        sums += tl.load(there + _ABS_SUM, spans < end, other=0.0)
        nonzero += tl.load(there + _NONZERO, spans < end, other=0.0)
        unusable += tl.load(there + _UNUSABLE, spans < end, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(found + tensor * _MEASURES + _ABS_SUM, total)
    tl.store(found + tensor * _MEASURES + _NONZERO, tl.sum(nonzero, axis=0))
    tl.store(found + tensor * _MEASURES + _UNUSABLE, tl.sum(unusable, axis=0))
    if DECAYS:
        mean = total / numel
        spread = _zeros(CHUNK)
        for start in range(first, end, CHUNK):
            spans = start + tl.arange(0, CHUNK)
            there = partials + spans * _MEASURES
            count = tl.minimum(numel - (spans - first) * SPAN, SPAN).to(tl.float64)
            apart = tl.load(there + _ABS_SUM, spans < end, other=0.0).to(tl.float64) / count - mean
            within = tl.load(there + _DEVIATIONS, spans < end, other=0.0)
            spread += tl.where(spans < end, within + count * apart * apart, 0.0)
        tl.store(found + tensor * _MEASURES + _DEVIATIONS, tl.sum(spread, axis=0))


@triton.jit
def _zeros(CHUNK: tl.constexpr):
    return tl.zeros([CHUNK], dtype=tl.float64)


@triton.jit(do_not_specialize=["tensors"])
def measure_group(table, found, tensors, total, unusable, strengths, CHUNK: tl.constexpr, DECAYS: tl.constexpr):
    """Of the whole group: AGR's sum, the unusable elements, and theta of each tensor; one program.

    Args:
        found: (tensors, MEASURES) float64.
        total: AGR's sum, 0-d float32, infinite below two elements other than 0; to be filled.
        unusable: 0-d int64, likewise.
        strengths: theta of each tensor, float32, likewise.
    """
    sums, nonzero, lost, counts = _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK)
    for start in range(0, tensors, CHUNK):
        numbers = start + tl.arange(0, CHUNK)
        mask = numbers < tensors
        there = found + numbers * _MEASURES
        sums += tl.load(there + _ABS_SUM, mask, other=0.0)
        nonzero += tl.load(there + _NONZERO, mask, other=0.0)
        lost += tl.load(there + _UNUSABLE, mask, other=0.0)
        counts += tl.load(table + numbers * FIELDS + NUMEL, mask, other=0).to(tl.float64)
    everything, elements = tl.sum(sums, axis=0), tl.sum(counts, axis=0)
    alone = tl.sum(nonzero, axis=0) < 2
    tl.store(total, tl.where(alone, float("inf"), everything).to(tl.float32))
    tl.store(unusable, tl.sum(lost, axis=0).to(tl.int64))
    if DECAYS:
        mean = everything / elements
        spread = _zeros(CHUNK)
        for start in range(0, tensors, CHUNK):
            numbers = start + tl.arange(0, CHUNK)
            mask = numbers < tensors
            there = found + numbers * _MEASURES
            count = tl.load(table + numbers * FIELDS + NUMEL, mask, other=1).to(tl.float64)
            apart = tl.load(there + _ABS_SUM, mask, other=0.0) / count - mean
            within = tl.load(there + _DEVIATIONS, mask, other=0.0)
            spread += tl.where(mask, within + count * apart * apart, 0.0)
        deviation = tl.sqrt(tl.sum(spread, axis=0) / elements)
        for start in range(0, tensors, CHUNK):
            numbers = start + tl.arange(0, CHUNK)
            mask = numbers < tensors
            count = tl.load(table + numbers * FIELDS + NUMEL, mask, other=1).to(tl.float64)
            apart = tl.load(found + numbers * _MEASURES + _ABS_SUM, mask, other=0.0) / count - mean
            z = tl.where(deviation > 0, apart / deviation, 0.0).to(tl.float32)
            z = tl.minimum(tl.maximum(z * _ALPHA, -_SATURATION), _SATURATION)
            tl.store(strengths + numbers, 2.0 / (1.0 + tl.exp(-z)), mask)

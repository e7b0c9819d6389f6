"""What kernels are compiled for, and the numbers that they look up: both are also read on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy

from ....config import OptimizerConfig
from ....storage import nibbles
from ...rules import StepScalars


class Rules(NamedTuple):
    """Which rules act on some tensors, and what they are written in; a kernel is compiled for each combination.

    Attributes:
        gradients, weights: their floating-point formats, from `table`.
        aligned: whether all addresses and sizes are multiples of sixteen.
        coded: whether a state may be written in codes.
        early, warmup: the phase.
        came, cautious: the options.
        bumps: whether the learning-rate mask is adjusted.
        decays: whether weights decay.
        row_scaled: whether ALLoRA applies.
        scaled: whether a context multiplies the learning rates.
        watched: whether a context sees every n-th element.
        momenta: how many multi-scale momenta have begun.
        sharded: whether they are shards.
    """

    gradients: int
    weights: int
    aligned: bool
    coded: bool = False
    early: bool = False
    warmup: bool = False
    came: bool = True
    cautious: bool = False
    bumps: bool = False
    decays: bool = False
    row_scaled: bool = False
    scaled: bool = False
    watched: bool = False
    momenta: int = 0
    sharded: bool = False


# Codes of the learning-rate mask go from 0 to this.
LARGEST_CODE = 255

# Where each number of a step lies in the vector that kernels look it up in.
(
    SECOND_RATE,
    EPS1,
    CLIP_THRESHOLD,
    CLIP_BOUND,
    MOMENTUM_RATE,
    BETA1,
    RESIDUAL_RATE,
    EPS2,
    CORRECTION,
    SHARE,
    EPS3,
    SCHEDULER,
    BUMP,
    MIN_LR,
    MAX_LR,
    ROW_FLOOR,
    WEIGHT_DECAY,
    CODE_LOW,
    CODES_A_UNIT,
    STEP,
    MOMENTA,
) = range(21)

# Then, for each momentum that has begun, in this order:
RATE, MEAN_SHARE, KEPT, TURN = range(4)
MOMENTUM_NUMBERS = 4


def numbers_of(step: int, config: OptimizerConfig, scalars: StepScalars) -> numpy.ndarray:
    """The numbers of a step, float32; the step itself is an int32 in its bits.

    Args:
        step: the step, from 1.
        config: the group's options.
        scalars: what changes with the step.
    """
    begun = [scale for scale in scalars.scales if scale.share != 0]
    numbers = numpy.zeros(MOMENTA + MOMENTUM_NUMBERS * len(begun), dtype=numpy.float32)
    beta1, beta2, beta3 = config.betas
    low, high = (float(numpy.float32(bound)) for bound in (config.min_lr, config.max_lr))  # as codes are scaled
    numbers[:STEP] = (
        1 - beta2, config.eps[0], config.clip_threshold, scalars.clip_bound, 1 - scalars.momentum_rate, beta1,
        1 - beta3, config.eps[1], 1.0 if scalars.bias_correction is None else scalars.bias_correction,
        scalars.gradient_share, config.eps[2], 1.0 if scalars.scheduler is None else scalars.scheduler,
        config.lr_bump, config.min_lr, config.max_lr, 1 / (config.eta * config.eta), config.weight_decay,
        low, LARGEST_CODE / (high - low) if high > low else 0.0,
    )  # fmt: skip
    numbers.view(numpy.int32)[STEP] = step
    for place, scale in enumerate(begun):
        kept = (1 - scale.rate) / scale.rate if scale.rate != 0 else 0.0
        turn = nibbles.LARGEST + 1 - nibbles.turning_point(step)
        start = MOMENTA + MOMENTUM_NUMBERS * place
        numbers[start : start + MOMENTUM_NUMBERS] = scale.rate, scale.share, kept, turn
    return numbers

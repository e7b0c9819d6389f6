"""One step of one stack: the techniques in their order. Read it beside the papers that the technique files name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import OptimizerConfig
from ..groups import Group
from ..phase import Phase
from ..stacks.stack import Traits
from ..stacks.workspace import Work
from ..techniques import (
    adabelief,
    agr,
    allora,
    came,
    cautious,
    consistency,
    grams,
    lr_mask,
    multiscale,
    orthograd,
    tam,
    weight_decay,
)
from ..techniques.multiscale import Momenta, Scale
from ..techniques.sums import OF_WHOLE_TENSORS, Sums
from .measure import at_every_nth


class States(Protocol):
    """The weights of a stack, and its states by name."""

    def weights(self, out: Tensor | None = None) -> Tensor:
        """The weights, (tensors, rows, columns) float32, to update in place; gathered into `out` if that helps."""

    def read(self, name: str) -> Tensor:
        """A state, (tensors, rows, columns), to update in place."""

    def write(self, name: str, stack: Tensor) -> None:
        """Store an updated state; `stack` may be overwritten."""


class StatesAndMomenta(States, Momenta, Protocol):
    """All that a stack carries from step to step."""


class Techniques(NamedTuple):
    """The rule in each place of a step. An ablation puts another function of the same arguments in a place."""

    regularize: Callable[..., Tensor] = agr.regularize_
    torque_aware_momentum: Callable[..., Tensor] = tam.torque_aware_momentum_
    consistency_momentum: Callable[..., Tensor] = consistency.consistency_momentum_
    divide_by_belief: Callable[..., Tensor] = adabelief.divide_by_belief_
    turn_to_gradient: Callable[..., Tensor] = grams.turn_to_gradient_
    remove_part_along_weights: Callable[..., Tensor] = orthograd.remove_part_along_weights_
    bump: Callable[..., None] = lr_mask.bump_


ALL_TECHNIQUES = Techniques()


class StepScalars(NamedTuple):
    """The numbers that change with the step.

    Attributes:
        momentum_rate: decay rate of the consistency momentum.
        gradient_share: Grams' share of the gradient's direction.
        clip_bound: bound of a gradient element where CAME is off.
        scheduler: by how much a scheduler has changed the learning rate; None for not at all.
        bias_correction: AdaBelief's; None where it is off.
        scales: the multi-scale momenta; empty in the optimizers without them.
    """

    momentum_rate: float
    gradient_share: float
    clip_bound: float
    scheduler: float | None
    bias_correction: float | None = None
    scales: tuple[Scale, ...] = ()

    @classmethod
    def of(cls, group: Group, traits: Traits) -> StepScalars:
        """The numbers of the step that parameters of some traits take in a group."""
        return cls.at(traits.step, group.config, group.scheduler_factor, traits.momentum_counts)

    @classmethod
    def at(
        cls, step: int, config: OptimizerConfig, scheduler: float, momentum_counts: tuple[int, ...] = ()
    ) -> StepScalars:
        """The numbers of a step, counted from 1.

        Args:
            step: the step.
            config: the group's options.
            scheduler: by how much a scheduler has changed the learning rate.
            momentum_counts: for each of momentum_scales how often it has been updated, this step included; empty in
                the optimizers without them.
        """
        return cls(
            momentum_rate=consistency.decay_rate(config.betas[0], config.beta1_decay, step),
            gradient_share=grams.gradient_share(config.beta1_decay, step),
            clip_bound=came.growing_bound(step),
            scheduler=None if scheduler == 1 else scheduler,
            bias_correction=adabelief.bias_correction(config.betas[2], step) if config.bias_correction else None,
            scales=multiscale.scales(config.momentum_scales[: len(momentum_counts)], momentum_counts, step),
        )


class Watched(NamedTuple):
    """What the context of the optimizer sees of a step: every n-th element of each tensor, (tensors, elements).

    Attributes:
        scaled_grad: the scaled gradient.
        change: the step that was taken, learning rate times update.
    """

    scaled_grad: Tensor
    change: Tensor


class StackOptions(NamedTuple):
    """What decides which rules act on a stack, and how; the same for hundreds of steps.

    Attributes:
        phase: the phase of the run.
        has_polarity: whether `last_polarity` holds the signs of a step before.
        row_scaled: whether ALLoRA applies.
        config: the group's options.
        watch_every: distance between the elements that the context sees; 0 for none.
        techniques: the rule in each place.
        watch_from: the first element that the context sees.
    """

    phase: Phase
    has_polarity: bool
    row_scaled: bool
    config: OptimizerConfig
    watch_every: int = 0
    techniques: Techniques = ALL_TECHNIQUES
    watch_from: int = 0


def take_step_(
    g: Tensor,
    states: StatesAndMomenta,
    magnitude_sum: Tensor,
    decay_strengths: Tensor | None,
    multiplier: Tensor | None,
    work: Work,
    scalars: StepScalars,
    options: StackOptions,
    sums: Sums = OF_WHOLE_TENSORS,
) -> tuple[Tensor, Watched | None]:
    """Update the weights and states of a stack of same-shape parameters, each seen as a matrix.

    Args:
        g: gradients, (tensors, rows, columns) float32, all of them usable; overwritten.
        states: the weights, and the states that the phase has; each is written back as soon as it is not needed.
        magnitude_sum: AGR's sum over the parameter group, 0-d.
        decay_strengths: theta of each tensor, (tensors,); None where nothing decays.
        multiplier: 0-d factor of all learning rates; None where no context drives the optimizer.
        work: memory to compute in.
        scalars: what changes with the step.
        options: which rules act.
        sums: adds up over whole tensors; asked what `shared.Asks` says.

    Returns:
        The new weights, to be written back, and what the context sees of the step.
    """
    sg, direction = scale_gradient_(g, states, magnitude_sum, work, scalars, options, sums)
    # The drive is not bound to a name here, so that its memory is free as soon as the second half is done with it.
    return move_(
        sg,
        direction,
        multiscale.multi_scale_momentum(sg, direction, states, scalars.scales, work.drive, work.scratch, sums),
        states,
        decay_strengths,
        multiplier,
        work,
        scalars,
        options,
        sums,
    )


def scale_gradient_(
    g: Tensor,
    states: States,
    magnitude_sum: Tensor,
    work: Work,
    scalars: StepScalars,
    options: StackOptions,
    sums: Sums = OF_WHOLE_TENSORS,
) -> tuple[Tensor, Tensor]:
    """The first half of a step, to the scaled gradient; arguments as of `take_step_`.

    Returns:
        The scaled gradient, and the gradient's sign.
    """
    config = options.config
    grad = options.techniques.regularize(g, magnitude_sum, work.scratch)
    if config.came:
        exp_avg_sq = states.read("exp_avg_sq")
        sg = came.scale_by_second_moment_(
            grad, exp_avg_sq, config.betas[1], config.eps[0], config.clip_threshold, work.scaled, sums
        )
        states.write("exp_avg_sq", exp_avg_sq)
    else:
        sg = came.clip_elements(grad, scalars.clip_bound, work.scaled)
    return sg, grad.sign_()


def move_(
    sg: Tensor,
    direction: Tensor,
    drive: Tensor | None,
    states: States,
    decay_strengths: Tensor | None,
    multiplier: Tensor | None,
    work: Work,
    scalars: StepScalars,
    options: StackOptions,
    sums: Sums = OF_WHOLE_TENSORS,
) -> tuple[Tensor, Watched | None]:
    """The second half of a step, from the scaled gradient to the weights.

    Args:
        sg: scaled gradient; overwritten.
        direction: sign of the gradient.
        drive: what the momentum follows; None for the scaled gradient.

    The others are as of `take_step_`.
    """
    phase, has_polarity, row_scaled, config, watch_every, techniques, watch_from = options
    eps1, eps2, eps3 = config.eps
    beta1, _, beta3 = config.betas
    watched_grad = at_every_nth(sg, watch_every, watch_from).clone() if watch_every else None

    exp_avg = states.read("exp_avg")
    if phase.early:
        s = states.read("s")
        residual = techniques.torque_aware_momentum(exp_avg, s, sg, eps1, work.scratch, drive, sums)
        states.write("s", s)
        del s
    else:
        residual = techniques.consistency_momentum(exp_avg, sg, scalars.momentum_rate, beta1, drive)
    del drive

    exp_avg_res = states.read("exp_avg_res")
    u = techniques.divide_by_belief(exp_avg, exp_avg_res, residual, beta3, eps2, scalars.bias_correction)
    states.write("exp_avg_res", exp_avg_res)
    states.write("exp_avg", exp_avg)
    del exp_avg, exp_avg_res
    p = states.weights(work.weights)  # Not before: of a very large tensor these are the most copies that ever are.

    u = techniques.turn_to_gradient(u, direction, scalars.gradient_share, work.scratch)

    if phase.early:
        u = techniques.remove_part_along_weights(u, p, eps3, work.scratch, sums)

    mask = states.read("lr_mask")
    if phase.warmup:
        polarity = lr_mask.positive(direction)
        if has_polarity:
            bounds = config.min_lr, config.max_lr
            techniques.bump(mask, polarity, states.read("last_polarity"), config.lr_bump, *bounds)
        states.write("last_polarity", polarity)

    if config.cautious:
        u = cautious.mask_disagreement_(u, direction, sums)

    if phase.early and decay_strengths is not None:
        u = weight_decay.add_decay_(u, p, decay_strengths, config.weight_decay)

    rates = mask
    if multiplier is not None:
        rates = torch.mul(mask, multiplier, out=work.scratch)
    rows = allora.row_scaling(p, config.eta) if row_scaled else None
    factor = lr_factor(scalars.scheduler, rows)
    u = u if factor is None else u.mul_(factor)
    p.addcmul_(rates, u, value=-1)
    if phase.warmup and has_polarity:
        states.write("lr_mask", mask)
    if watched_grad is None:
        return p, None
    watched_rates, watched_u = (at_every_nth(stack, watch_every, watch_from) for stack in (rates, u))
    return p, Watched(watched_grad, watched_rates * watched_u)


def lr_factor(scheduler: float | None, row_scaling: Tensor | None) -> float | Tensor | None:
    """What the mask is multiplied by to give the effective learning rate: the scheduler's factor, and ALLoRA's.

    Returns:
        A number or a (tensors, rows, 1) tensor; None for 1.
    """
    if scheduler is None or row_scaling is None:
        return scheduler if row_scaling is None else row_scaling
    return row_scaling * scheduler

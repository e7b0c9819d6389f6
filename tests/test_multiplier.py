"""The multiplier of C-Optim on a bowl with noise: where it settles, that it comes back, what it leaves to schedules.

The bowl is sum h x^2 / 2 with curvatures h from 0.01 to 1, and the noise of a gradient is larger than the gradient.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from library.automagic_cameamp import Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit
from library.cameamp.context.controller import Law
from library.cameamp.context.driver import Context

STEPS = 300


def descend(optimizer_class=Automagic_CameAMP_COptim, steps=STEPS, kicks=None, schedule=None, spoil=None, **options):
    """The lengths of all steps, root mean squares, and the losses before them.

    `kicks` are what the multiplier is multiplied by after some steps, and `spoil` changes a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    curvature = 10 ** (-2 * torch.rand(64, 64, generator=generator))
    p = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    options = {"lr": 1e-6, "max_lr": 1.0, "warmup_steps": 100, "fused": False, "full_finetune": True, **options}
    optimizer = optimizer_class([p], **options)
    lengths, losses = [], []
    for step in range(steps):
        before = p.detach().clone()
        p.grad = curvature * before + torch.randn(64, 64, generator=generator)
        if spoil is not None:
            spoil(step, p.grad, generator)
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = options["lr"] * schedule(step)
        losses.append((0.5 * curvature * before.square()).mean().item())
        optimizer.report_loss(losses[-1] * (1 + 0.1 * torch.randn((), generator=generator).item()))
        optimizer.step()
        lengths.append((p.detach() - before).square().mean().sqrt().item())
        if kicks and step in kicks:
            values = optimizer.c_optim._memory.values
            values["multiplier"] = values["multiplier"] * kicks[step]
    return lengths, losses


def typical(lengths):
    """The middle of the lengths of the last steps, in which single ones differ by a factor of two."""
    return statistics.median(lengths[-30:])


@pytest.mark.parametrize("kick", [100.0, 0.01])
def test_it_returns_to_its_fixed_point_from_both_sides(kick):
    steady, losses = descend()
    kicked, losses_kicked = descend(kicks={120: kick})
    assert abs(math.log(kicked[121] / steady[121])) > 2
    # Long steps have led away from the minimum, and from there longer ones are right.
    assert 1 / 3 < typical(kicked) / typical(steady) < 5
    assert losses_kicked[-1] < 2.5 * losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("factor", [10, 100])
def test_it_does_without_the_bound(factor):
    """From the same start, with bounds so high that nothing meets them."""
    low, high = (descend(max_lr=bound)[1][-1] for bound in (1.0, float(factor)))
    assert high == pytest.approx(low, rel=0.03)


@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_where_it_settles_does_not_depend_on_the_lr(lr):
    lengths, losses = descend(lr=lr)
    expected, expected_losses = descend()
    assert 0.5 < typical(lengths) / typical(expected) < 2
    assert losses[-1] == pytest.approx(expected_losses[-1], rel=0.25)


def cosine(step, steps=STEPS):
    warmup = steps // 20
    return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def restarts(step):
    return cosine(step % (STEPS // 2), STEPS // 2)


def linear(step):
    return 1 - step / STEPS


def test_it_settles_as_long_as_a_schedule_falls():
    before, after, later, at_the_top = (
        Law(haste=0.0).gain_at(*at) for at in ((0, 0.5), (60, 0.5), (240, 0.5), (240, 1.0))
    )
    assert after == pytest.approx(before / 4)
    assert later == pytest.approx(before / 25)
    assert at_the_top == Law(haste=0.0).gain_at(0, 1.0)


def test_a_schedule_without_a_top_does_not_keep_it_from_finding_a_rate():
    falling, _ = descend(schedule=linear)
    constant, _ = descend()
    found, expected = (statistics.median(lengths[50:80]) for lengths in (falling, constant))
    assert 0.5 < found / (1 - 65 / STEPS) / expected < 2


@pytest.mark.parametrize("schedule", [cosine, restarts, linear])
def test_it_leaves_the_fall_to_the_schedule(schedule):
    """Below half of its top the step lengths follow it within 10 %, but for steps that edge cases halve."""
    lengths, _ = descend(schedule=schedule)
    falls = [step for step in range(1, STEPS - 3) if schedule(step) < min(schedule(step - 1), 0.5)]
    cycles = [[step for step in falls if step < STEPS // 2], [step for step in falls if step >= STEPS // 2]]
    for fall in cycles if schedule is restarts else [falls]:
        found = [lengths[step] / schedule(step) for step in fall]
        middles = [statistics.median(found[start : start + 10]) for start in range(0, len(found) - 9, 10)]
        assert len(middles) >= 5
        assert all(abs(middle / middles[0] - 1) < 0.1 for middle in middles)


def test_small_alignments_take_it_as_far():
    """Where noise hides the most of them: the multiplier has no shorter way to go there."""

    def noisier(step, grad, generator):
        grad.add_(3 * torch.randn(grad.shape, generator=generator))

    class Unpaced(Context):
        law = Law(pace=0.0)

    class Slow(Automagic_CameAMP_COptim):
        _driver_class = Unpaced

    lengths, losses = descend(spoil=noisier)
    slow, losses_of_slow = descend(Slow, spoil=noisier)
    assert lengths[40] > 4 * slow[40]
    assert losses[100] < 0.95 * losses_of_slow[100]
    assert losses[-1] < 1.05 * losses_of_slow[-1]


def on_noise(seed, shape, steps):
    """The multiplier after each of some steps of independent gradients."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator))
    optimizer = Automagic_CameAMP_COptim([p], warmup_steps=100, full_finetune=True, fused=False)
    multipliers = []
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        multipliers.append(optimizer.c_optim.compute_contextual_lr_multiplier())
    return multipliers


def test_noise_alone_does_not_lengthen_the_steps():
    """Where noise hides whether steps are too long, as in batches of one image, longer ones are a risk for nothing."""
    runs = [on_noise(seed, (128, 128), 400) for seed in range(3)]
    assert statistics.mean(math.log(multipliers[-1] / multipliers[100]) for multipliers in runs) < math.log(1.5)


def test_chance_does_not_take_it_far_below_its_start():
    """The pace counts a typical alignment in full, also where all of them are chance."""
    assert min(on_noise(seed, (64, 128), 40)[-1] for seed in range(6)) > 0.5


def test_bad_data_does_not_ruin_a_run():
    def noise(step, grad, generator):
        if step % 50 == 10:  # 2 % of the batches
            grad.copy_(10 * torch.randn(grad.shape, generator=generator))

    def tenfold(step, grad, generator):
        if 100 <= step < 120:
            grad.mul_(10)

    clean = descend()
    for spoil in (noise, tenfold):
        lengths, losses = descend(spoil=spoil)
        assert losses[-1] < 1.3 * clean[1][-1]
        assert 1 / 3 < typical(lengths) / typical(clean[0]) < 3


@pytest.mark.parametrize("optimizer_class", [Automagic_CameAMP_COptim, Automagic_CameAMP_COptim8bit])
def test_steps_stay_bounded_where_gradients_are_steady(optimizer_class):
    """Ten times the learning rate at most, whatever the length of the warm-up."""
    for warmup in (2, 500):
        p = torch.nn.Parameter(torch.full((64, 64), 0.1))
        optimizer = optimizer_class(
            [p], lr=1e-4, warmup_steps=warmup, full_finetune=True, lr_bump=0.0, weight_decay=0.0
        )
        p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            before = p.detach().clone()
            optimizer.step()
            rate = optimizer.c_optim.lr_history[-1]
            assert (p.detach() - before).square().mean().sqrt().item() < 10.1 * rate

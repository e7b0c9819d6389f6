"""Properties that the techniques promise, whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.automagic_cameamp import Automagic_CameAMP
from library.cameamp.techniques import (
    adabelief,
    agr,
    allora,
    came,
    cautious,
    consistency,
    grams,
    lr_mask,
    orthograd,
    tam,
    weight_decay,
)

seeds = st.integers(0, 2**31)
scales = st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3])
shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
# Without subnormal numbers: some library builds switch them off for the whole process.
rates = st.floats(0, 0.999, allow_subnormal=False)
means_of_gradients = st.floats(0, 1e18, allow_subnormal=False)
spreads = st.floats(0, 1e10, allow_subnormal=False)


def stack(shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(shapes, seeds, scales)
def test_agr_shrinks_and_keeps_signs(shape, seed, scale):
    g = stack(shape, seed, scale)
    total = agr.magnitude_sum(g.abs().sum((1, 2)), (g != 0).float().sum((1, 2)))
    regularized = agr.regularize_(g.clone(), total)
    assert (regularized.abs() <= g.abs()).all()
    assert (regularized * g >= 0).all()
    if g.numel() == 1:
        assert torch.equal(regularized, g)


@given(shapes, seeds, scales, st.floats(0.1, 2.0))
def test_came_bounds_the_root_mean_square(shape, seed, scale, threshold):
    grad = stack(shape, seed, scale)
    exp_avg_sq = stack(shape, seed + 1, scale).square()
    scaled = came.scale_by_second_moment_(grad, exp_avg_sq, 0.99, 1e-30, threshold)
    assert (scaled.square().mean((1, 2)).sqrt() <= threshold * 1.0001).all()


@given(seeds, scales)
def test_tam_correlation_and_damping(seed, scale):
    exp_avg, s = stack((3, 7, 5), seed), torch.zeros(3, 7, 5)
    tam.torque_aware_momentum_(exp_avg, s, stack((3, 7, 5), seed + 1, scale), 1e-30)
    assert (s.sum(dim=1).abs() <= (1 - tam.DECAY) * 1.0001).all()  # a tenth of a cosine per column


@pytest.mark.parametrize("shape", [(1, 9, 4), (2, 7, 5), (1, 40, 1), (1, 1, 40)])
def test_tam_by_some_rows_is_tam(shape, monkeypatch):
    """Of large tensors; the norms are of whole columns all the same."""

    def moved(elements):
        monkeypatch.setattr(tam, "_PART", elements)
        exp_avg, s, sg = stack(shape, 1), stack(shape, 2), stack(shape, 3)
        return torch.stack([tam.torque_aware_momentum_(exp_avg, s, sg, 1e-30, drive=stack(shape, 4)), exp_avg, s])

    assert torch.allclose(moved(8), moved(1000), rtol=1e-6, atol=1e-7)


def test_tam_damps_a_gradient_that_turns():
    momentum = torch.ones(1, 4, 1)
    along, against = torch.zeros(1, 4, 1), torch.zeros(1, 4, 1)
    first, second = momentum.clone(), momentum.clone()
    tam.torque_aware_momentum_(first, along, torch.ones(1, 4, 1), 1e-30)
    tam.torque_aware_momentum_(second, against, -torch.ones(1, 4, 1), 1e-30)
    assert (first - 0.9).mean() > (0.9 - second).mean()


@given(rates, st.floats(0.9, 1.0), st.integers(1, 10**6))
def test_consistency_rate_never_below_four_tenths(beta1, decay, step):
    assert 0.4 <= consistency.decay_rate(beta1, decay, step) < 1


@given(shapes, seeds)
def test_grams_at_decay_1_has_the_gradients_sign_everywhere(shape, seed):
    update, grad = stack(shape, seed), stack(shape, seed + 1)
    grad[grad.abs() < 0.3] = 0
    turned = grams.turn_to_gradient_(update.clone(), grad.sign(), grams.gradient_share(1.0, 12345))
    assert torch.equal(turned.sign(), grad.sign() * (update != 0))
    assert torch.equal(turned.abs()[grad != 0], update.abs()[grad != 0])


@given(shapes, seeds, scales, scales)
def test_orthogonal_step_is_orthogonal_and_keeps_its_norm(shape, seed, u_scale, p_scale):
    n, rows, columns = shape
    if rows * columns < 3:
        columns += 2
    update, p = stack((n, rows, columns), seed, max(u_scale, 1e-3)), stack((n, rows, columns), seed + 1, p_scale)
    result = orthograd.remove_part_along_weights_(update.clone(), p, 1e-8)
    norm = update.flatten(1).norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1).double(), p.flatten(1).double())
    parallel = torch.nn.functional.cosine_similarity(update.flatten(1).double(), p.flatten(1).double()).abs()
    well_posed = parallel < 0.99
    assert (cosine.abs()[well_posed] < 1e-5).all()
    assert torch.allclose(result.flatten(1).norm(dim=1)[well_posed], norm[well_posed], rtol=1e-4)


def test_orthogonal_step_leaves_what_has_no_direction():
    update = stack((2, 3, 4), 0)
    p = torch.zeros(2, 3, 4)
    p[1] = 1.0
    result = orthograd.remove_part_along_weights_(update.clone(), p, 1e-8)
    assert torch.equal(result[0], update[0])
    assert not torch.equal(result[1], update[1])
    single = torch.tensor([[[2.0]]])
    assert torch.equal(orthograd.remove_part_along_weights_(single.clone(), single, 1e-8), single)


def test_orthogonal_step_along_the_weights_is_not_blown_up():
    p = stack((1, 5, 5), 0)
    assert orthograd.remove_part_along_weights_(p * 3, p, 1e-8).isfinite().all()


@given(seeds, st.lists(st.booleans(), min_size=1, max_size=60), st.floats(1e-7, 1e-3))
def test_mask_stays_within_bounds_and_moves_by_a_bump(seed, signs, start):
    mask, polarity = torch.full((1, 3, 3), start), torch.zeros(1, 3, 3, dtype=torch.bool)
    for number, flip in enumerate(signs):
        direction = stack((1, 3, 3), seed + number).sign() * (-1 if flip else 1)
        before = mask.clone()
        agreed = polarity == (direction > 0)
        lr_mask.bump_(mask, lr_mask.positive(direction), polarity, 3e-6, 1e-7, 1e-3)
        expected = (before + torch.where(agreed, 3e-6, -3e-6)).clamp(1e-7, 1e-3)
        assert torch.equal(mask, expected)
        polarity = direction > 0
        assert (mask >= torch.tensor(1e-7)).all()
        assert (mask <= torch.tensor(1e-3)).all()


@given(shapes, seeds, scales, st.floats(0.1, 10))
def test_row_scaling(shape, seed, scale, eta):
    scaling = allora.row_scaling(stack(shape, seed, scale), eta)
    assert scaling.shape == (shape[0], shape[1], 1)
    assert (scaling <= eta * 1.0001).all()
    assert (scaling > 0).all()
    assert torch.allclose(
        allora.row_scaling(torch.zeros(shape), eta), torch.full((shape[0], shape[1], 1), eta), rtol=1e-5
    )


@given(st.lists(means_of_gradients, min_size=1, max_size=20), spreads, st.integers(1, 10**6))
def test_decay_strength_lies_between_0_and_2(means, spread, count):
    n = len(means)
    strengths = weight_decay.decay_strengths(
        torch.tensor(means), torch.full((n,), spread), torch.full((n,), float(count))
    )
    assert (strengths > 0).all()
    assert (strengths < 2).all()
    if len(set(means)) == 1 and spread == 0:
        assert torch.equal(strengths, torch.ones(n))


def test_decay_strength_grows_with_the_gradient():
    strengths = weight_decay.decay_strengths(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.full((3,), 10.0))
    assert strengths[0] < 1 < strengths[2]


@given(shapes, seeds)
def test_cautious_never_opposes_the_gradient(shape, seed):
    update, direction = stack(shape, seed), stack(shape, seed + 1).sign()
    masked = cautious.mask_disagreement_(update.clone(), direction)
    assert (masked * direction >= 0).all()
    agrees = update * direction > 0
    n = shape[1] * shape[2]
    for before, after, kept in zip(update, masked, agrees):
        assert torch.allclose(after[kept], before[kept] * n / (kept.sum() + 1))


def train(scale, steps=60, **options):
    """Weights after some steps on gradients that are `scale` times the same ones."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(8, 16), (16, 8), (9,), (4, 3, 3, 3)]]
    start = [p.detach().clone() for p in params]
    # came's own clip is out of the way, as the promise says.
    optimizer = Automagic_CameAMP(params, lr=1e-4, warmup_steps=40, clip_threshold=1e6, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 0.01 * scale
        optimizer.step()
    return torch.cat([(p - before).detach().flatten() for p, before in zip(params, start)])


@pytest.mark.parametrize("scale", [1e-3, 0.1, 7.0, 1e3])
def test_a_scaled_loss_gives_the_same_training(scale):
    reference, scaled = train(1.0), train(scale)
    assert (scaled - reference).norm() <= 1e-4 * reference.norm()


def test_the_scale_matters_without_came():
    reference, scaled = train(1.0, came=False), train(1e3, came=False)
    assert (scaled - reference).norm() > 1e-2 * reference.norm()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_an_element_without_gradient_does_not_move(weight_decay):
    """Weight decay and orthogonal steps excepted, which act early: the weight is 0 there. Later neither acts."""
    p = torch.nn.Parameter(stack((6, 6), 0))
    p.data[2, 3] = 0.0
    other = torch.nn.Parameter(stack((6, 6), 1))
    optimizer = Automagic_CameAMP([p, other], lr=1e-3, warmup_steps=30, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for q in (p, other):
            q.grad = torch.randn(q.shape, generator=generator)
        p.grad[2, 3] = 0.0
        optimizer.step()
    assert p[2, 3] == 0.0
    late = Automagic_CameAMP([p, other], lr=1e-3, warmup_steps=0, weight_decay=weight_decay)
    p.data[2, 3] = 0.7
    for _ in range(20):
        for q in (p, other):
            q.grad = torch.randn(q.shape, generator=generator)
        p.grad[2, 3] = 0.0
        late.step()
    assert p[2, 3] == torch.tensor(0.7)


def test_weight_decay_shrinks_an_element_without_gradient():
    """With a weight of 0-norm direction excluded by a single-element tensor, decay is all that is left."""
    p, other = torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Automagic_CameAMP([p, other], lr=1e-3, warmup_steps=1000, weight_decay=1.0)
    p.grad, other.grad = torch.zeros(1), torch.ones(4, 4)
    optimizer.step()
    theta = 2 / (1 + math.exp(-4 * (0.0 - 16 / 17) / math.sqrt(16 / 17 - (16 / 17) ** 2)))
    assert p.item() == pytest.approx(2 * (1 - 1e-3 * theta), rel=1e-6)


def test_bias_correction_makes_the_first_step_as_long_as_the_last():
    """Of a momentum and a residual that never change."""
    exp_avg, exp_avg_res = torch.full((1, 2, 2), 0.3), torch.zeros(1, 2, 2)
    updates = []
    for step in range(1, 41):
        residual = torch.full((1, 2, 2), 0.5)
        correction = adabelief.bias_correction(0.99, step)
        updates.append(adabelief.divide_by_belief_(exp_avg, exp_avg_res, residual, 0.99, 1e-16, correction))
    assert torch.allclose(torch.stack(updates), torch.tensor(0.6), rtol=1e-4)

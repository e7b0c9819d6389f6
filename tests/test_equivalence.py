"""The product against the plain implementation, over 600 steps and both phase changes."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from itertools import compress

import pytest
import torch
from reference import ReferenceCameAMP, ReferenceCOptim

from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP_COptim
from library.cameamp.rounding import stochastic_round
from library.cameamp.step import engine, passes

STEPS = 600
WARMUP = 400  # phases change at steps 200 and 400

# Kernels of 1x1 are stacked with the matrices of their size.
LORA = [(8, 32), (48, 8), (8, 16, 3, 3), (24, 8, 1, 1), (8, 32), (48, 8), (8, 32, 1, 1), (48, 8, 1, 1)]
MIXED = [(32,), (16, 12), (6, 5, 3, 3), (16, 12), (1,), (), (1, 7), (32,)]

RULES = "rules"
# Kernels treat a large tensor as several threads would if even the smallest counts as one.
KERNELS = {"kernels": {}, "kernels, cut": {"_LARGEST_WHOLE": 0, "_MANY": 0}}
TAKERS = [RULES, *KERNELS] if importlib.util.find_spec("numba") else [RULES]


@contextmanager
def taken_by(taker):
    """Within it, steps are taken by the rules or by kernels, and by nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        if taker == RULES:
            patch.setattr(engine, "_AUTOMATIC", set())
            yield
            return
        from library.cameamp.step.kernels.cpu import step

        for name, value in KERNELS[taker].items():
            patch.setattr(step, name, value)

        def served(self, group, stacks):
            kernels = serve(self, group, stacks)
            assert kernels is not None
            return kernels

        serve = engine.Engine._kernels_of
        patch.setattr(engine.Engine, "_kernels_of", served)
        yield


def problem(shapes, seed=0):
    """Parameters with a noisy quadratic: gradients with a signal, noise, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.05) for s in shapes]
    if shapes is LORA:
        for p in params[1::2]:
            p.data.zero_()
    targets = [torch.randn(p.shape, generator=generator) * 0.1 for p in params]
    return params, targets, generator


def set_gradients(params, targets, generator, step, copies, skip=None):
    """A gradient for each parameter, and the same for each of the copies of it."""
    for index, (p, target) in enumerate(zip(params, targets)):
        own = [p, *(each[index] for each in copies)]
        if skip is not None and skip(step, index):
            for q in own:
                q.grad = None
            continue
        noise = torch.randn(p.shape, generator=generator) * 0.05
        grad = (p.detach() - target + noise) * (10.0 ** (index % 3 - 2))
        if step == 0 and p.ndim == 2:
            grad = torch.zeros_like(grad) if index % 2 == 0 else grad
        if p.ndim == 4:
            grad[0] = 0.0
        for q in own:
            q.grad = grad.clone()


BASE = (Automagic_CameAMP, ReferenceCameAMP)
CONTEXTUAL = (Automagic_CameAMP_COptim, ReferenceCOptim)


def compare(
    shapes,
    split=None,
    schedule=None,
    skip=None,
    group_options=({}, {}),
    steps=STEPS,
    lora=False,
    classes=BASE,
    **options,
):
    """Let all who may take the steps go along with the plain implementation."""
    leading, targets, generator = problem(shapes)
    split = len(leading) if split is None else split
    parts = [slice(0, split), slice(split, None)] if split < len(leading) else [slice(0, None)]
    options = {"warmup_steps": WARMUP, **options}

    def built(optimizer_class, params, **more):
        groups = [{"params": params[part], **own} for part, own in zip(parts, group_options)]
        return optimizer_class(groups, **options, **more)

    def copied():
        return [torch.nn.Parameter(p.detach().clone()) for p in leading]

    takers = TAKERS if not options.get("factored") else [RULES]  # No kernel reads factored states.
    others = copied()
    plain = built(classes[1], others, lora=lora)
    all_params = [leading, *(copied() for _ in takers[1:])]
    all_ours = [built(classes[0], params) for params in all_params]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(ours, schedule) for ours in all_ours if schedule]
    is_contextual = issubclass(classes[0], Automagic_CameAMP_COptim)
    for step in range(steps):
        set_gradients(leading, targets, generator, step, [*all_params[1:], others], skip)
        if schedule:
            plain.scale = [schedule(step)] * len(parts)
        before = [p.detach().clone() for p in leading]
        is_stepped = [p.grad is not None for p in leading]  # Afterwards some may be gone.
        plain.step()
        for taker, ours, params in zip(takers, all_ours, all_params):
            with taken_by(taker):
                ours.step()
            if is_contextual:
                multiplier = ours.c_optim.compute_contextual_lr_multiplier()
                assert multiplier == pytest.approx(plain.multiplier, rel=2e-3), (taker, step)
            for p, other, start in compress(zip(params, others, before), is_stepped):
                boundary = 2 / p.numel() if options.get("cautious") and p.numel() > 100 else 0.0
                states = ours.state[p], plain.state[other]
                assert_close(p, other, start, *states, (taker, step), options["warmup_steps"], boundary)
        for scheduler in schedulers:
            scheduler.step()
        # From here all go on from the same numbers, or rounding would be compounded for hundreds of steps.
        for p, other in compress(zip(leading, others), is_stepped):
            adopt(p, other, all_ours[0].state[p], plain.state[other])
        for ours, params in zip(all_ours[1:], all_params[1:]):
            follow(ours, params, all_ours[0], leading)
        if is_contextual:
            plain.multiplier = all_ours[0].c_optim.compute_contextual_lr_multiplier()


def follow(ours, params, leader, leading):
    """Take over the weights, the states and the multiplier of an optimizer that another took the step of."""
    for p, first in zip(params, leading):
        p.data.copy_(first.data)
        for name, value in leader.state[first].items():
            if torch.is_tensor(value):
                ours.state[p][name].copy_(value)
    if hasattr(ours, "c_optim"):
        ours.c_optim._memory.values["multiplier"] = leader.c_optim._memory.values["multiplier"].clone()


def assert_close(p, other, start, state, expected, at, warmup_steps=WARMUP, boundary=0.0):
    """Equal but for float32 rounding: of the weights, of the step, and of momenta of size 1 that cancel.

    `at` says who took which step. `boundary` is by how much the step may differ where an element on the cautious mask's
    boundary changes sides, which rescales all others.
    """
    largest_step = (other.detach() - start).abs().max().item()
    cancelled = 2e-6 * (expected["lr_mask"] / expected["exp_avg_res"].sqrt()).max().item()
    tolerance = (2e-5 + boundary) * largest_step + cancelled
    assert torch.allclose(p.detach(), other.detach(), rtol=2e-7, atol=tolerance), (*at, p.shape)
    state = unfactored(state)
    momenta = tuple(name for name in state if name.startswith("momentum_scale"))
    others = ("exp_avg_sq",) if "exp_avg_sq" in state else ()
    names = ("exp_avg", *momenta, "exp_avg_res", "lr_mask", *others)
    found, wanted = (torch.stack([each[name].flatten() for name in names]) for each in (state, expected))
    scale = wanted.abs().amax(1, keepdim=True)
    scale[: 1 + len(momenta)] = 1.0
    close = (found - wanted).abs() <= 2e-5 * wanted.abs() + 1e-6 * scale
    assert close.all(), (*at, names[close.all(1).int().argmin()], p.shape)
    warmup = at[-1] + 1 < warmup_steps
    assert ("s" in state) == ("last_polarity" in state)
    if warmup and "s" in state:
        assert torch.equal(state["last_polarity"], expected["last_polarity"].view(p.shape))


def unfactored(state):
    """States of which means of rows and columns are kept, as what these stand for."""
    factored = {key.removesuffix("_row") for key in state if key.endswith("_row")}
    products = {
        name: torch.outer(state[f"{name}_row"], state[f"{name}_col"] / state[f"{name}_col"].mean()) for name in factored
    }
    return {**state, **products}


def adopt(p, other, state, expected):
    other.data.copy_(p.data)
    state = unfactored(state)
    for name in expected.keys() & state.keys() - {"step", "last_polarity"}:
        expected[name] = state[name].reshape(expected[name].shape).clone()


def test_rounding_does_not_add_up():
    """600 steps on gradients that do not depend on the weights, without ever aligning any two."""
    start, _, generator = problem(LORA)
    others, *all_params = ([torch.nn.Parameter(p.detach().clone()) for p in start] for _ in range(1 + len(TAKERS)))
    all_ours = [Automagic_CameAMP(params, warmup_steps=WARMUP, lr=1e-5) for params in all_params]
    plain = ReferenceCameAMP([{"params": others}], lora=True, warmup_steps=WARMUP, lr=1e-5)
    drift = [torch.randn(p.shape, generator=generator) * 0.3 for p in start]
    for _ in range(STEPS):
        for mean, *same in zip(drift, others, *all_params):
            grad = mean + torch.randn(mean.shape, generator=generator)
            for p in same:
                p.grad = grad
        plain.step()
        for taker, ours in zip(TAKERS, all_ours):
            with taken_by(taker):
                ours.step()
    for taker, params in zip(TAKERS, all_params):
        for p, other, before in zip(params, others, start):
            moved = (other - before).norm()
            assert moved > 0.01 * before.norm()
            assert (p - other).norm() < 1e-4 * moved, taker


def test_lora_factors():
    compare(LORA, lora=True)


def test_vectors_matrices_kernels_scalars():
    compare(MIXED, schedule=lambda step: 1.0)


def test_several_groups_with_their_own_options():
    own = ({"lr": 1e-4}, {"lr": 5e-3, "weight_decay": 0.1, "betas": (0.9, 0.95, 0.99), "lr_bump": 1e-5})
    compare(MIXED, split=3, group_options=own)


def test_lora_plus_groups():
    params = [LORA[0], LORA[2], LORA[4], LORA[1], LORA[3], LORA[5]]
    compare(params, split=3, group_options=({}, {"lr": 1.6e-5}), lora=True)


def test_parameters_that_skip_steps():
    compare(MIXED, skip=lambda step, index: (step + index) % 7 == 0 or (index == 3 and step < 250))


def warmup(step):
    return min(1.0, step / 50)


def cosine(step):
    import math

    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


@pytest.mark.parametrize("schedule", [warmup, cosine])
def test_schedulers(schedule):
    compare(LORA, schedule=schedule, lora=True)


@pytest.mark.parametrize(
    "options",
    [
        {"came": False},
        {"cautious": True},
        {"bias_correction": True},
        {"factored": True},
        {"full_finetune": True},
        {"weight_decay": 0.1, "lr": 1e-3},
        {"clip_threshold": 0.3, "eta": 0.5, "beta1_decay": 0.99},
        {"lr": 1e-3, "min_lr": 1e-5, "lr_bump": 1e-4, "eps": (1e-12, 1e-6, 1e-8)},
    ],
    ids=lambda options: ",".join(options),
)
def test_options(options):
    """What no option changes is compared for longer above: the warm-up is short to cross both phase changes soon."""
    compare(LORA, lora=True, steps=180, warmup_steps=120, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum_scales": (2, 7), "cautious": True},
        {"momentum_scales": ()},
        {"lr": 1e-3, "adaptation_rate": 0.03, "came": False},
        {"split": 3, "group_options": ({"lr": 1e-4}, {"lr": 5e-3, "momentum_scales": (1, 3)})},
        {"skip": lambda step, index: (step + index) % 7 == 0},
        {"schedule": cosine},
    ],
    ids=["default", "scales", "no scales", "lr", "groups", "skip", "schedule"],
)
def test_contextual(options):
    """Edge cases aside, which test_context.py asks for; the warm-up is short to cross both phase changes."""
    shapes = MIXED if "skip" in options else LORA
    compare(
        shapes, classes=CONTEXTUAL, steps=120, lora=shapes is LORA, edge_threshold=1.0,
        **{"warmup_steps": 80, **options},
    )  # fmt: skip


class OneByOne:
    """An optimizer whose parameters are stepped one by one, the last ones first; `step` takes those left over."""

    def step(self):
        self.step_each()
        super().step()

    def step_each(self, _=None):
        for group in reversed(self.param_groups):
            for index, p in reversed(list(enumerate(group["params"]))):
                if index != 2:
                    self.step_parameter(p, group, index)


class InBackward(OneByOne):
    """The same in a backward pass, where gradients wait for one another."""

    def step(self):
        root = torch.zeros((), requires_grad=True)
        root.register_hook(self.step_each)
        root.backward()
        super(OneByOne, self).step()


def one_by_one(ours, plain, way=InBackward):
    """The two classes, with steps that are taken one by one."""
    return type("Ours", (way, ours), {}), type("Plain", (plain,), {"one_by_one": True})


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (LORA, {"lora": True}),
        (MIXED, {"split": 3, "group_options": ({"lr": 1e-4}, {"lr": 5e-3, "weight_decay": 0.1})}),
        (MIXED, {"skip": lambda step, index: (step + index) % 7 == 0 or (index == 3 and step < 250)}),
    ],
    ids=["LoRA", "groups", "skip"],
)
@pytest.mark.parametrize("way", [OneByOne, InBackward])
def test_steps_inside_the_backward_pass(shapes, options, way):
    compare(shapes, classes=one_by_one(*BASE, way), steps=120, warmup_steps=80, **options)


def test_contextual_steps_inside_the_backward_pass():
    classes = one_by_one(*CONTEXTUAL)
    compare(LORA, classes=classes, steps=120, lora=True, edge_threshold=1.0, warmup_steps=80)


@pytest.mark.parametrize("taker", TAKERS)
def test_no_warmup(taker):
    params, targets, generator = problem(MIXED)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = Automagic_CameAMP(params, warmup_steps=0, lr=1e-4)
    plain = ReferenceCameAMP([{"params": others}], lora=False, warmup_steps=0, lr=1e-4)
    for step in range(20):
        set_gradients(params, targets, generator, step, [others])
        with taken_by(taker):
            ours.step()
        plain.step()
    for p, other in zip(params, others):
        assert torch.allclose(p, other, rtol=1e-5, atol=1e-8)
        assert set(ours.state[p]) == {"step", "lr_mask", "exp_avg", "exp_avg_sq", "exp_avg_res"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_before_rounding(dtype, monkeypatch):
    """From the same weights each step, the value that is then rounded is the plain implementation's."""
    exact = {}

    def capture(x, dtype, dither):
        exact.update(zip(dither.positions.tolist(), x.clone()))
        return stochastic_round(x, dtype, dither)

    monkeypatch.setattr(passes, "stochastic_round", capture)
    params, targets, generator = problem(LORA)
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours = Automagic_CameAMP(params, warmup_steps=WARMUP, lr=1e-4)
    plain = ReferenceCameAMP([{"params": others}], lora=True, warmup_steps=WARMUP, lr=1e-4)
    for step in range(STEPS):
        for p, other, target in zip(params, others, targets):
            grad = (p.detach().float() - target + torch.randn(p.shape, generator=generator)).to(dtype)
            p.grad, other.grad = grad, grad.float()
        before = [p.detach().float() for p in params]
        with taken_by(RULES):
            ours.step()
        plain.step()
        for index, (p, other, start) in enumerate(zip(params, others, before)):
            assert p.dtype == dtype
            assert_close(exact[index].view(p.shape), other, start, ours.state[p], plain.state[other], (RULES, step))
            other.data.copy_(p.detach())
            adopt(other, other, ours.state[p], plain.state[other])

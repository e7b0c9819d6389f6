"""fused=True: the same numbers, and a fallback where compiling fails."""

from __future__ import annotations

import logging

import pytest
import torch

from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)
from library.cameamp import compiling

SHAPES = [(8, 40), (48, 8), (8, 40), (48, 8), (9,)]
CODED = [(64, 64), (16, 320), (9,)]  # The first two are large enough for codes.


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    compiling._compiled.cache_clear()
    yield
    compiling._compiled.cache_clear()


@pytest.fixture(scope="module")
def compiler():
    """Skip where nothing can be compiled, as on a Windows without a C++ compiler; training falls back there."""
    try:
        torch.compile(torch.sin)(torch.ones(3))
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        pytest.skip(f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0]}")


def trained(steps=10, optimizer_class=Automagic_CameAMP, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = optimizer_class(params, lr=1e-3, warmup_steps=8, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    return params


def assert_same_training(a, b, between_codes=0):
    """The same but for rounding; in so many elements it falls between two codes, and they get one or the other."""
    differ = [torch.isclose(p, q, rtol=1e-5, atol=1e-7).logical_not() for p, q in zip(a, b)]
    assert sum(int(d.sum()) for d in differ) <= between_codes
    for p, q in zip(a, b):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-3 if between_codes else 1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": True},
        {"optimizer_class": Automagic_CameAMP8bit, "shapes": CODED},
        {"optimizer_class": Automagic_CameAMP_COptim, "momentum_scales": (1, 2, 3)},
        {"optimizer_class": Automagic_CameAMP_COptim, "momentum_scales": ()},
        {"optimizer_class": Automagic_CameAMP_COptim8bit, "shapes": CODED},
    ],
    ids=["plain", "bias correction", "8-bit", "contextual", "no scales", "contextual 8-bit"],
)
def test_same_numbers_in_all_phases(options, caplog, compiler):
    between_codes = 1 if options.get("optimizer_class") is Automagic_CameAMP8bit else 0
    assert_same_training(trained(fused=True, **options), trained(**options), between_codes)
    assert not [r for r in caplog.records if r.name.startswith("library") and r.levelno >= logging.WARNING]  # Compiled.


def test_compile_failure_falls_back_with_one_warning(caplog, monkeypatch):
    def failing(*arguments, **options):
        def call(*arguments, **options):
            raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here")

        return call

    monkeypatch.setattr(compiling.torch, "compile", failing)
    caplog.set_level(logging.WARNING)
    assert_same_training(trained(fused=True), trained())
    (line,) = [r.message for r in caplog.records if r.name.startswith("library")]
    assert "no compiler here" in line


def test_other_failures_are_not_hidden(monkeypatch):
    def failing(*arguments, **options):
        def call(*arguments, **options):
            raise MemoryError("out of memory")

        return call

    monkeypatch.setattr(compiling.torch, "compile", failing)
    try:
        trained(fused=True)
    except MemoryError:
        return
    raise AssertionError("the failure was swallowed")


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="older versions of PyTorch compile anew for another number")
def test_few_graphs_whatever_changes(compiler):
    """No step, learning rate or bound compiles anything anew, and a shape no more than a graph a part of the rules."""

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def train(sizes, **options):
        params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
        optimizer = Automagic_CameAMP(params, warmup_steps=0, fused=True, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
            scheduler.step()

    torch._dynamo.utils.counters.clear()
    train([(8, 40), (48, 8), (8, 40), (48, 8)])
    first = graphs()
    assert 0 < first <= 2  # a pass over the gradients, and the rules
    train([(8, 40), (48, 8)] * 3, lr=1e-5, eta=3.0, clip_threshold=0.5, beta1_decay=0.99, max_lr=1e-2)
    assert graphs() == first
    train([(6, 20), (30, 6)] * 2)
    assert graphs() <= first + 2 * 2


def test_only_groups_that_ask_for_it_are_compiled(monkeypatch):
    """Beside a group that asks for it, another one's 8-bit states are unpacked and packed uncompiled."""
    compiled = []
    monkeypatch.setattr(compiling, "_compiled", lambda function: compiled.append(function.__name__) or function)

    def compiled_with(*fused):
        compiled.clear()
        params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in fused]
        for p in params:
            p.grad = torch.randn(64, 64)
        groups = [{"params": [p], "fused": asks} for p, asks in zip(params, fused)]
        Automagic_CameAMP8bit(groups, warmup_steps=0).step()
        return list(compiled)

    assert set(compiled_with(True)) == {"_first_pass", "_decode", "_on_copies", "_encode"}
    assert compiled_with(False, True) == compiled_with(True)
    assert not compiled_with(False)

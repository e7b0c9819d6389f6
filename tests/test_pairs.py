"""A checkpoint of any of the optimizers loads into any other, in every phase, and training goes on."""

from __future__ import annotations

import logging

import pytest
from reliability.runs import OPTIMIZERS, PAIRS, PHASES, Run, difference

QUANTIZED = 4  # Of the parameters of a run, those of 4,096 elements.


def short(value):
    return value.__name__.removeprefix("Automagic_CameAMP_") if isinstance(value, type) else value


def is_eight_bit(optimizer_class):
    return "8bit" in optimizer_class.__name__


def is_contextual(optimizer_class):
    return "COptim" in optimizer_class.__name__


def lines(caplog, *words):
    return [r.message for r in caplog.records if any(word in r.message for word in words)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=short)
def test_training_goes_on(first, second, phase, caplog):
    before = Run(first).run(PHASES[phase])
    caplog.set_level(logging.INFO)
    after = before.resumed(second)
    notes = lines(caplog, "converted", "fresh", "freed")
    assert len(notes) == (first is not second)
    if is_eight_bit(first) != is_eight_bit(second):
        assert f"states of {QUANTIZED} parameters are converted" in notes[0]
    losses = [before.loss()] + [after.run(1).loss() for _ in range(10)]
    assert max(losses[1:]) <= 1.02 * losses[0]
    assert losses[-1] < losses[0]
    if is_contextual(first) == is_contextual(second):
        assert losses[-1] == pytest.approx(before.run(10).loss(), rel=0.02)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=short)
def test_the_same_optimizer_gets_everything_back(optimizer_class, phase):
    before = Run(optimizer_class).run(PHASES[phase])
    after = before.resumed(optimizer_class)
    for group in before.optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # Which is what loading makes explicit.
    assert difference(before.everything(), after.everything()) is None


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=short)
def test_one_line_tells_what_is_freed_and_what_starts_fresh(first, second, caplog):
    caplog.set_level(logging.INFO)
    Run(first).run(6).resumed(second, warmup_steps=5, came=False).run(1)
    (line,) = lines(caplog, "freed")
    # One parameter has taken only two steps yet, which is in the warm-up of both.
    for words in ("exp_avg_sq of 8", "s of 7", "last_polarity of 7"):
        assert words in line.partition("freed")[2]
    caplog.clear()
    Run(first, warmup_steps=5, came=False).run(6).resumed(second).run(1)
    (line,) = lines(caplog, "fresh")
    for words in ("exp_avg_sq of 8", "s of 7", "last_polarity of 7"):
        assert words in line.partition("fresh")[2]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 1000}, {"momentum_scales": (1, 2, 7)}], ids=str)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=short)
def test_what_was_loaded_can_be_saved_and_loaded_again_before_any_step(first, second, options, phase):
    """As accelerate's `prepare` does it."""
    after = Run(first).run(PHASES[phase]).resumed(second, **options)
    again = after.resumed(second, **options)
    assert difference(after.everything(), again.everything()) is None
    assert difference(after.run(3).everything(), again.run(3).everything()) is None

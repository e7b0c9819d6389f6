"""Second moment and residual kept as the means of their rows and columns."""

from __future__ import annotations

import logging

import pytest
import torch
from reliability.runs import OPTIMIZERS, PHASES, SHAPES, Run, difference, from_bytes, to_bytes
from torch import nn

from benchmarks.cost import state_bytes
from benchmarks.models import load
from library.automagic_cameamp import Automagic_CameAMP, OptimizerConfig
from library.cameamp.phase import Phase
from library.cameamp.states import EIGHT_BITS, bytes_of
from library.cameamp.storage.factored import Factored

by_class = pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda c: c.__name__)
FACTORED = ("exp_avg_sq", "exp_avg_res")


def test_matrices_are_factored_and_vectors_are_not():
    run = Run(Automagic_CameAMP, factored=True).run(12)
    for p, shape in zip(run.params, SHAPES.values()):
        state = run.optimizer.state[p]
        for name in FACTORED:
            if len(shape) < 2:
                assert state[name].shape == p.shape
            else:
                assert name not in state
                assert state[f"{name}_row"].shape == (shape[0],)
                assert state[f"{name}_col"].shape == (p[0].numel(),)
    counted = sum(
        bytes_of(p.shape, Phase.at(12, 8), run.optimizer.config, run.optimizer._precision) for p in run.params
    )
    assert state_bytes(run.optimizer) == counted


@pytest.mark.parametrize(("step", "bar"), [(1, 3.3), (500, 2.2)])
def test_8_bit_states_of_a_model_take_few_bytes(step, bar):
    shapes = [torch.Size(shape) for shape in load("sdxl_full")]
    config = OptimizerConfig(factored=True)
    held = sum(bytes_of(shape, Phase.at(step, config.warmup_steps), config, EIGHT_BITS) for shape in shapes)
    assert held / sum(shape.numel() for shape in shapes) <= bar


def test_what_is_kept_has_the_means_of_what_was_written():
    values = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    state = Factored().new(3, torch.Size([5, 7]), torch.device("cpu"))
    assert not state.read().any()
    state.write(values.clone(), None)
    for dim in (1, 2):
        assert torch.allclose(state.read().mean(dim), values.mean(dim))
    state.write(torch.full((3, 5, 7), 1e-32), None)  # whose product is 0
    assert torch.allclose(state.read(), torch.tensor(1e-32), rtol=1e-5, atol=0)


@by_class
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("in_backward", [False, True])
def test_resuming_is_bit_for_bit(optimizer_class, phase, in_backward):
    first = Run(optimizer_class, factored=True, in_backward=in_backward).run(PHASES[phase])
    second = first.resumed(optimizer_class, factored=True, in_backward=in_backward)
    for run in (first, second):
        run.run(4).optimizer.state_dict()
    found = [{k: v for k, v in run.everything().items() if "initial_lr" not in k} for run in (first, second)]
    assert difference(*found) is None


@by_class
@pytest.mark.parametrize("factored", [False, True])
def test_a_checkpoint_converts(optimizer_class, factored, caplog):
    before = Run(optimizer_class, factored=factored).run(11)
    caplog.set_level(logging.INFO)
    after = before.resumed(optimizer_class, factored=not factored)
    (note,) = [r.message for r in caplog.records if "converted" in r.message]
    assert "states of 6 parameters are converted" in note
    for p, q in zip(before.params[:6], after.params):
        # Of what is kept in full the means are taken; of means the product.
        full, means = (run.optimizer.state[x] for run, x in ((before, p), (after, q))[:: -1 if factored else 1])
        if "exp_avg_sq" in full:
            assert torch.allclose(full["exp_avg_sq"].flatten(1).mean(1), means["exp_avg_sq_row"], rtol=1e-5, atol=0)
            assert torch.allclose(full["exp_avg_sq"].flatten(1).mean(0), means["exp_avg_sq_col"], rtol=1e-5, atol=0)
    assert after.run(10).loss() < 0.99 * before.loss()


def test_gradients_of_0_leave_everything_finite():
    p = nn.Parameter(torch.randn(8, 16))
    optimizer = Automagic_CameAMP([p], factored=True, warmup_steps=2)
    for step in range(6):
        p.grad = torch.zeros_like(p) if step < 4 else torch.eye(8, 16)
        optimizer.step()
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[p].values() if torch.is_tensor(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("exp_avg_sq_col"), "the state 'exp_avg_sq_col' is missing"),
        (lambda state: state["exp_avg_sq_row"].neg_(), "the state 'exp_avg_sq' has negative elements"),
        (lambda state: state.update(exp_avg_res_row=torch.ones(3)), r"'exp_avg_res_row' has shape \(3,\)"),
        (lambda state: state["exp_avg_res_col"].fill_(torch.nan), "'exp_avg_res_col' has elements that are not finite"),
    ],
    ids=["missing", "negative", "shape", "not finite"],
)
def test_damage_is_seen(change, message):
    saved = from_bytes(to_bytes(Run(Automagic_CameAMP, factored=True).run(3).optimizer.state_dict()))
    change(saved["state"][0])
    with pytest.raises(ValueError, match=message):
        Run(Automagic_CameAMP, factored=True).optimizer.load_state_dict(saved)


def test_kernels_leave_it_to_the_rules_and_say_so(caplog):
    run = Run(Automagic_CameAMP, factored=True, fused=True).run(2)
    assert [r.levelname for r in caplog.records if "no kernel reads factored states" in r.message] == ["WARNING"]
    assert difference(run.everything(), Run(Automagic_CameAMP, factored=True, fused=False).run(2).everything()) in (
        None,
        "group 0 fused",
    )

"""The context of C-Optim: what reaches it, what it says, and what follows for the learning rates."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from library.automagic_cameamp import (
    Automagic_CameAMP,
    Automagic_CameAMP_COptim,
    report_loss,
)

SHAPES = [(8, 16), (16, 8), (12,)]


def training(optimizer_class=Automagic_CameAMP_COptim, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in SHAPES]
    return params, optimizer_class(params, **{"warmup_steps": 20, **options})


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_losses_reach_the_context_by_every_way():
    params, optimizer = training()
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    set_gradients(params, 0)
    optimizer.report_loss(torch.tensor(1.0, requires_grad=True))
    optimizer.step()
    report_loss(optimizer, 2)
    optimizer.step()
    report_loss(wrapped, torch.tensor([3.0]))
    wrapped.step()
    optimizer.step(lambda: torch.tensor(4.0))
    optimizer.step()
    assert optimizer.c_optim.loss_history == [1.0, 2.0, 3.0, 4.0]


def test_several_reports_are_averaged():
    params, optimizer = training()
    set_gradients(params, 0)
    for value in (1.0, 2.0, torch.tensor(6.0)):
        optimizer.report_loss(value)
    optimizer.step()
    assert optimizer.c_optim.loss_history == [3.0]


@pytest.mark.parametrize("other", [None, object(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)])
def test_reporting_to_others_is_silent(other):
    report_loss(other, torch.tensor(1.0))
    report_loss(training(Automagic_CameAMP)[1], "anything")


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="the loss is 'low'; allowed: a number or a tensor"):
        training()[1].report_loss("low")

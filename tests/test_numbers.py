"""Gradients and parameters at the edges: what is refused, what is ignored, and that nothing ever becomes non-finite."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from reliability.runs import OPTIMIZERS

from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP8bit, Automagic_CameAMP_COptim, report_loss
from library.cameamp.stacks import workspace
from library.cameamp.stacks.workspace import Work, Workspace
from library.cameamp.storage import blockwise


def all_finite(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38, -1.1e18])
def test_unusable_elements_count_as_zero(bad):
    def run(value):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(6, 6)), torch.nn.Parameter(torch.randn(6))]
        optimizer = Automagic_CameAMP(params, lr=1e-4, warmup_steps=6)
        for number in range(9):
            for p in params:
                p.grad = torch.randn_like(p)
            params[0].grad[1, number % 6] = value
            if number == 4:
                params[1].grad.fill_(value)
            optimizer.step()
        return params, optimizer

    expected, _ = run(0.0)
    params, optimizer = run(bad)
    assert all(torch.equal(a, b) for a, b in zip(expected, params))
    assert all_finite(optimizer)
    assert optimizer.nonfinite_elements() == 9 + 6


def test_the_tally_is_exact_beyond_what_float32_can_count():
    p = torch.nn.Parameter(torch.zeros(1024, 1024))
    optimizer = Automagic_CameAMP([p], warmup_steps=0)
    for _ in range(16):
        p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
    assert optimizer.nonfinite_elements() == 2**24
    p.grad = torch.zeros_like(p)
    p.grad[1, 2] = float("nan")
    optimizer.step()
    assert optimizer.nonfinite_elements() == 2**24 + 1


def test_the_largest_usable_magnitude():
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Automagic_CameAMP([p], lr=1e-4)
    for _ in range(3):
        p.grad = torch.full((4, 4), 1e18)
        optimizer.step()
    assert optimizer.nonfinite_elements() == 0
    assert all_finite(optimizer)


def test_gradients_are_left_as_they_are():
    for shapes in ([(5, 5)], [(5, 5), (5, 5)]):
        params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        optimizer = Automagic_CameAMP(params)
        for p in params:
            p.grad = torch.randn_like(p)
            p.grad[0, 0] = float("inf")
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before))


def test_sparse_and_complex_gradients_are_refused_before_anything_changes():
    good = torch.nn.Parameter(torch.randn(3, 3))
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = Automagic_CameAMP([good, embedding.weight])
    good.grad = torch.ones(3, 3)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = good.detach().clone()
    with pytest.raises(RuntimeError, match=r"\(10, 4\) is sparse"):
        optimizer.step()
    assert torch.equal(good, before)
    assert not optimizer.state

    number = torch.nn.Parameter(torch.ones(2, 7, dtype=torch.complex64))
    optimizer = Automagic_CameAMP([number])
    number.grad = torch.ones_like(number)
    with pytest.raises(RuntimeError, match=r"\(2, 7\) is complex"):
        optimizer.step()


def test_no_gradient_no_step():
    p, q = torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3, 3))
    optimizer = Automagic_CameAMP([p, q], lr=1e-4)
    before = q.detach().clone()
    for _ in range(3):
        p.grad = torch.randn(3, 3)
        optimizer.step()
    assert torch.equal(q, before)
    assert q not in optimizer.state
    assert optimizer.state[p]["step"] == 3


def test_step_without_any_gradient():
    optimizer = Automagic_CameAMP([torch.nn.Parameter(torch.randn(3))])
    optimizer.step()
    assert optimizer.step(lambda: 1.5) == 1.5


def test_closure():
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Automagic_CameAMP([p], lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first == 9.0
    assert optimizer.step(closure) < 9.0


@pytest.mark.parametrize("shapes", [[()], [(1,)], [(1, 1)], [(), (1,), (1, 1)], [(0, 4), (3, 3)], [(0,)]], ids=str)
@pytest.mark.parametrize("warmup_steps", [0, 6])
def test_tiny_and_empty_parameters(shapes, warmup_steps):
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = Automagic_CameAMP(params, lr=1e-3, warmup_steps=warmup_steps)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert all_finite(optimizer)
    optimizer.get_learning_rates()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_single_element_with_gradient_is_not_regularized_away():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Automagic_CameAMP([p], lr=1e-3, warmup_steps=0)
    p.grad = torch.zeros(4, 4)
    p.grad[1, 2] = 0.5
    optimizer.step()
    assert (p != 1).sum() == 1


def test_lora_plus_groups_whose_gradients_are_all_zero_at_first():
    """A fresh LoRA's ups are 0, so its downs get no gradient: with LoRA+, a whole group of exact zeros."""
    downs = [torch.nn.Parameter(torch.randn(4, 16)) for _ in range(3)]
    ups = [torch.nn.Parameter(torch.zeros(16, 4)) for _ in range(3)]
    optimizer = Automagic_CameAMP([{"params": downs}, {"params": ups, "lr": 1.6e-5}], warmup_steps=8)
    before = [p.detach().clone() for p in downs]
    for number in range(12):
        for p in downs:
            p.grad = torch.zeros_like(p) if number == 0 else torch.randn_like(p)
        for p in ups:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all_finite(optimizer)
        if number == 0:
            # Weight decay of at most lr * weight_decay * 2 is all that may have moved them.
            assert all(torch.allclose(p, b, rtol=1e-7) for p, b in zip(downs, before))
    assert not torch.equal(downs[0], before[0])


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e-20, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_gradients_and_zero_weights_stay_finite(scale, dtype):
    params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in [(6, 6), (3, 4, 2, 2), (7,)]]
    options = {"lr": 1e-1, "max_lr": 1.0, "min_lr": 0.0, "lr_bump": 0.5, "weight_decay": 10.0, "warmup_steps": 40}
    optimizer = Automagic_CameAMP(params, **options)
    for _ in range(80):
        for p in params:
            p.grad = (torch.randn(p.shape) * scale).to(dtype)
        optimizer.step()
    assert all_finite(optimizer)


def test_parameters_moved_to_another_dtype_before_the_first_step():
    layer = torch.nn.Linear(8, 8)
    optimizer = Automagic_CameAMP(layer.parameters(), lr=1e-3)
    layer.to(torch.bfloat16)
    layer(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert layer.weight.dtype == torch.bfloat16
    assert optimizer.state[layer.weight]["lr_mask"].dtype == torch.float32


@pytest.mark.parametrize("lend", [True, False], ids=["work memory lent", "allocated"])
@pytest.mark.parametrize("optimizer_class", [Automagic_CameAMP, Automagic_CameAMP8bit])
@pytest.mark.parametrize("came", [True, False])
def test_transposed_parameters(optimizer_class, came, lend, monkeypatch):
    """Alone in their batch, with and without the memory that only CPUs keep."""
    if not lend:
        monkeypatch.setattr(Workspace, "lend", lambda self, stack: Work())

    def run(layout):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(layout(torch.randn(64, 96, generator=generator)))
        optimizer = optimizer_class([p], lr=1e-3, warmup_steps=6, came=came)
        for _ in range(9):
            p.grad = layout(torch.randn(64, 96, generator=generator))
            optimizer.step()
        return p

    transposed = run(lambda x: x.t().contiguous().t())
    assert not transposed.is_contiguous()
    assert torch.allclose(transposed, run(lambda x: x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_gradients_kept_for_the_second_pass_or_gathered_again(optimizer_class, monkeypatch):
    """All, some or none of the stacks: the same weights to the last bit, and nobody's gradients are written to."""

    def run(elements):
        monkeypatch.setattr(workspace, "_LARGEST_HELD", elements)
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in [(64, 96), (64, 96), (32, 8)]]
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = optimizer_class(groups, lr=1e-3, warmup_steps=6, fused=False)
        for step in range(9):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            params[step % 3].grad[0, :2] = torch.tensor([torch.nan, 1e20])
            before = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(torch.equal(p.grad.nan_to_num(7), g.nan_to_num(7)) for p, g in zip(params, before))
        stacks = [stack for group in optimizer._groups for stack in group.stacks_with_states(optimizer.state)]
        kept = [optimizer._engine._workspace.holds(stack) for stack in stacks]
        assert optimizer.nonfinite_elements() == 18
        return params, kept

    (gathered, none), (mixed, some), (held, all_of_them) = run(0), run(300), run(2**20)
    assert (none, some, all_of_them) == ([False, False], [False, True], [True, True])
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(gathered, mixed, held))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_another_default_dtype_changes_nothing(optimizer_class, default):
    def run():
        for made_once in (blockwise._map, blockwise._code_of_zero, blockwise.tables_of):
            made_once.cache_clear()
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(64, 64, generator=generator, dtype=torch.float32).to(dtype))
            for dtype in (torch.float32, torch.float32, torch.bfloat16)
        ]
        optimizer = optimizer_class(params, lr=1e-3, warmup_steps=6)
        for _ in range(9):
            for p in params:
                p.grad = torch.randn(64, 64, generator=generator, dtype=torch.float32).to(p.dtype)
            optimizer.step()
        optimizer_class(params, lr=1e-3).load_state_dict(optimizer.state_dict())  # All is of the dtype it must have.
        return params

    expected = run()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_autocast_around_a_step_changes_nothing(optimizer_class):
    def run(around):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 128, generator=generator))
        optimizer = optimizer_class([p], lr=1e-3, warmup_steps=6)
        for _ in range(12):
            p.grad = torch.randn(64, 128, generator=generator)
            with around():
                optimizer.step()
        other = torch.nn.Parameter(p.detach().clone())
        other.grad = torch.ones(64, 128)
        with around():
            resumed = Automagic_CameAMP_COptim([other], lr=1e-3, warmup_steps=6)
            resumed.load_state_dict(optimizer.state_dict())
            resumed.get_learning_rates()  # allocates what the checkpoint lacked
            resumed.step()
        return p, other

    expected, got = run(nullcontext), run(lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_deterministic_training_and_another_default_device_are_no_hindrance(optimizer_class):
    blockwise.tables_of.cache_clear()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):  # stands for a GPU, with the parameters on the CPU
            p = torch.nn.Parameter(torch.ones(64, 128, device="cpu"))
            optimizer = optimizer_class([p, torch.nn.Parameter(torch.ones(3, device="cpu"))], warmup_steps=3)
            for _ in range(4):
                for q in optimizer.param_groups[0]["params"]:
                    q.grad = torch.ones_like(q)
                report_loss(optimizer, torch.ones((), device="cpu"))
                optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert p.device.type == "cpu"
    assert (p != 1).all()


def test_non_contiguous_weights_and_gradients():
    def run(layout):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(layout(torch.randn(8, 4, 3, 3))) for _ in range(2)]
        optimizer = Automagic_CameAMP([{"params": params[:1]}, {"params": params[1:]}], lr=1e-3, warmup_steps=6)
        for _ in range(9):
            for p in params:
                p.grad = layout(torch.randn(8, 4, 3, 3))
            optimizer.step()
        return params

    plain = run(lambda x: x)
    other = run(lambda x: x.to(memory_format=torch.channels_last))
    assert other[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(plain, other))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_kernels_of_1x1_are_matrices(optimizer_class):
    """Beside matrices of their size, saved and resumed: the weights of matrices alone, and states of their shape."""

    def run(layout):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(64, 96, generator=generator)) for _ in range(4)]
        for p in params[1::2]:
            p.data = layout(p.data)
        optimizer = optimizer_class(params, lr=1e-4, warmup_steps=6)
        for step in range(9):
            for p in params:
                p.grad = torch.randn(64, 96, generator=generator).view(p.shape)
            optimizer.step()
            if step == 4:
                saved = optimizer.state_dict()
                optimizer = optimizer_class(params, lr=1e-4, warmup_steps=6)
                optimizer.load_state_dict(saved)
        for p in params:
            state = optimizer.state[p]
            assert (state["exp_avg_q"] if "exp_avg_q" in state else state["exp_avg"]).shape == p.shape
        return params

    alone = run(lambda x: x)
    beside = run(lambda x: x.view(64, 96, 1, 1).to(memory_format=torch.channels_last))
    assert beside[1].ndim == 4
    assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(alone, beside))


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_a_matrix_may_become_a_kernel(dtype, count):
    params = [torch.nn.Parameter(torch.ones(64, 96, dtype=dtype)) for _ in range(count)]
    optimizer = Automagic_CameAMP(params, lr=1e-3, warmup_steps=6)
    for shape in ((64, 96), (64, 96, 1, 1)):
        for p in params:
            p.grad = None
            p.data = torch.ones(shape, dtype=dtype)
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all((p != 1).any() for p in params)

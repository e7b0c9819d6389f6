"""Gradients and options at their extremes: every weight and state stays finite."""

from __future__ import annotations

import gc
import math
import random
from typing import Any

import torch
from torch import Tensor

from .runs import states_are_finite

SCALES = (0.0, 1e-45, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 9e17, 1e38)
# One parameter group has each of these. Together they put every option that a rule computes with at both of its ends.
EXTREME_OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": 1e-7, "eps": (1e-35, 1e-35, 1e-35), "betas": (0.0, 0.0, 0.0)},
    {
        "lr": 1e-3, "eps": (1.0, 1.0, 1.0), "betas": (0.999999, 0.999999, 0.999999), "clip_threshold": 1e30,
        "eta": 1e6, "beta1_decay": 1.0, "weight_decay": 100.0,
    },
    {
        "lr": 0.5, "min_lr": 0.0, "max_lr": 1.0, "lr_bump": 1.0, "clip_threshold": 1e-30, "eta": 1e-6,
        "beta1_decay": 1e-6, "bias_correction": True,
    },
    {
        "came": False, "cautious": True, "lr_bump": 0.0, "eps": (1e-35, 1e-35, 1e-35), "betas": (0.0, 0.0, 0.0),
        "full_finetune": True,
    },
)  # fmt: skip
# All groups share one context. The first has enough history to test losses and gradients, the second never has.
_OF_THE_CONTEXT: tuple[dict[str, Any], ...] = (
    {"context_window": 20, "edge_threshold": 1.0, "adaptation_rate": 1.0},
    {"context_window": 2, "edge_threshold": 1e-6, "adaptation_rate": 0.0},
)
# Every group has a large parameter, whose states the 8-bit classes quantize. One group also has a small one, whose
# states they do not quantize, and an empty one. More parameters would make long runs slower and show nothing else. The
# 1-d parameter has no gradient in some steps.
_LARGE = (64, 64)
_SMALL = ((7,), (3, 2, 3, 3), (), (16, 8))
_EMPTY = (0, 3)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# With this many seeds every group has had every shape, and its large parameter every dtype.
ARRANGEMENTS = len(EXTREME_OPTIONS) * len(_SMALL)


def extreme_steps(optimizer_class: type[Any], steps: int, seed: int = 0) -> int:
    """Train float32, bfloat16 and float16 with gradients of any magnitude, some elements of which are not finite.

    Every matrix has the name of a LoRA factor, so that ALLoRA is on unless full_finetune is set.

    Args:
        optimizer_class: one of the family.
        steps: number of steps; the early phase, the late warm-up and the time after it get a third each.
        seed: of everything random; it also decides which group has which shape and dtype.

    Returns:
        The number of gradient elements that were counted as 0.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    groups, params = [], []
    with_small = (seed + seed // len(_SMALL)) % len(EXTREME_OPTIONS)
    for number, options in enumerate(EXTREME_OPTIONS):
        shapes = (_LARGE, _SMALL[seed % len(_SMALL)], _EMPTY) if number == with_small else (_LARGE,)
        dtypes = [_DTYPES[(seed + number + index) % len(_DTYPES)] for index in range(len(shapes))]
        own = [_parameter(shape, rng, generator, dtype) for shape, dtype in zip(shapes, dtypes)]
        groups.append({"params": own, **options})
        params += own
    of_the_context = _OF_THE_CONTEXT[seed % len(_OF_THE_CONTEXT)]
    optimizer = optimizer_class(groups, warmup_steps=max(2, steps * 2 // 3), **of_the_context)
    optimizer.set_parameter_names({p: "lora_down.weight" for p in params if p.ndim > 1})
    unusable = 0
    for step in range(steps):
        for p in params:
            p.grad = _gradient(p, rng, generator)
            if p.grad is not None:
                unusable += int((~p.grad.isfinite() | (p.grad.abs().float() > 1e18)).sum())
        if hasattr(optimizer, "report_loss"):
            optimizer.report_loss(rng.choice([1.0, 1e-38, 1e38, -1.0, float("nan"), float("inf")]))
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            assert states_are_finite(optimizer), f"not finite after step {step + 1}"
            assert _context_is_finite(optimizer), f"context not finite after step {step + 1}"
            assert _is_quantized(optimizer, eight_bit="8bit" in optimizer_class.__name__), "not stored in 8 bits"
    tally = optimizer.nonfinite_elements()
    assert tally == unusable, f"{tally} elements are tallied, {unusable} were unusable"
    return unusable


def _context_is_finite(optimizer: Any) -> bool:
    """Whether everything that drives the learning rates is finite. Histories have NaN in place of unknown values."""
    if not hasattr(optimizer, "c_optim"):
        return True
    saved = optimizer.c_optim.state_dict()
    scalars = [v.item() for v in saved["c_optim_context"].values() if v.ndim == 0]
    samples = [v for name, v in saved["c_optim_context"].items() if name.startswith("last_")]
    multipliers = [saved["contextual_lr_multiplier"], optimizer.c_optim.compute_contextual_lr_multiplier()]
    return all(map(math.isfinite, scalars + multipliers)) and all(bool(v.isfinite().all()) for v in samples)


def _is_quantized(optimizer: Any, eight_bit: bool) -> bool:
    """Whether the masks of the large parameters alone are stored in 8 bits, or none if the class has 32-bit states."""
    return all(("lr_mask_q" in state) == (eight_bit and p.shape == _LARGE) for p, state in optimizer.state.items())


def _parameter(
    shape: tuple[int, ...], rng: random.Random, generator: torch.Generator, dtype: torch.dtype
) -> torch.nn.Parameter:
    scale = rng.choice([0.0, 1e-20, 1.0, 1e4])
    return torch.nn.Parameter((scale * torch.randn(shape, generator=generator)).to(dtype))


def _gradient(p: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor | None:
    if p.ndim == 1 and rng.random() < 0.1:
        return None
    grad = (rng.choice(SCALES) * torch.randn(p.shape, generator=generator)).to(p.dtype)
    bad = rng.choice([float("nan"), float("inf"), -float("inf")])
    how = rng.random()
    if how < 0.05:
        grad.fill_(bad)
    elif how < 0.2 and grad.numel() > 0:
        grad.view(-1)[rng.randrange(grad.numel())] = bad
    return grad


def long_run(
    optimizer_class: type[Any], steps: int, every: int = 1000, warmup_steps: int = 500
) -> list[tuple[int, float, int, float]]:
    """Train a small model for many steps.

    Args:
        optimizer_class: one of the family.
        steps: number of steps.
        every: number of steps between two measurements.
        warmup_steps: of the optimizer; fewer than `every`.

    Returns:
        At every measurement: the step, the resident memory of this process in MiB, the bytes of all tensors, the loss.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 64))
    optimizer = optimizer_class(model.parameters(), lr=1e-5, warmup_steps=warmup_steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 64, generator=generator) / 8
    looks = []
    for step in range(1, steps + 1):
        x = torch.randn(16, 64, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), x @ teacher)
        loss.backward()
        if hasattr(optimizer, "report_loss"):
            optimizer.report_loss(loss.detach())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % every == 0:
            assert states_are_finite(optimizer), f"not finite at step {step}"
            looks.append((step, resident_mebibytes(), tensor_bytes(), loss.item()))
    return looks


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach; a storage that tensors share counts once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (Tensor, torch.nn.Parameter):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_mebibytes() -> float:
    """Resident memory of this process in MiB; 0 on systems without /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20

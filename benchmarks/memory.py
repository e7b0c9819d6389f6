"""How much memory does training all weights take: weights, gradients, states, and what a step computes in?

Weights and gradients are bfloat16. Optimizers that can step inside the backward pass do, so that few gradients are
alive: those of the two largest tensors count. For the others all gradients count. What a step computes in is measured
in a backward pass over the two largest tensors, with the hooks that step and free, or in a step of the largest one, by
what is allocated beyond gradients; the last lines compare it with all that a backward pass over a slice of the model
allocates. States are counted shape by shape: this family's from its table of states, which
tests hold against real ones, the peers' in one real tensor of each shape after a step. Kernels are off, as on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from library import automagic_cameamp as family
from library.cameamp.config import OptimizerConfig
from library.cameamp.phase import Phase
from library.cameamp.states import bytes_of

from .cost import peak_bytes, state_bytes
from .models import NAMES, load
from .table import Table

Shape = tuple[int, ...]
Build = Callable[[list[torch.nn.Parameter]], Any]

_GB = 1e9
_ADAFACTOR = {"lr": 1e-6, "relative_step": False, "scale_parameter": False}
_BYTES_OF_WEIGHT = 2
_SLICE = 100_000_000


class Contender(NamedTuple):
    """An optimizer of the table.

    Attributes:
        name: how the table calls it.
        build: builds it.
        step: the name of the method that trainers call inside the backward pass; "" if none of them does.
        state_bytes: what the states of a parameter of a shape take.
    """

    name: str
    build: Build
    step: str
    state_bytes: Callable[[Shape], int]


def contenders() -> Iterator[Contender]:
    """This family's, in both phases, and the peers that are installed."""
    for name in ("Automagic_CameAMP8bit", "Automagic_CameAMP_COptim8bit", "Automagic_CameAMP"):
        for factored in (True, False):
            for phase, warmup_steps in (("warm-up", 1000), ("after", 0)):
                label = f"{name.removeprefix('Automagic_')}{', factored' if factored else ''}, {phase}"
                yield _ours(label, name, OptimizerConfig(factored=factored, warmup_steps=warmup_steps, fused=False))
    for name, module, options, step in (
        ("AdamW8bit", "bitsandbytes.optim", {"lr": 1e-6}, ""),
        (
            "Adafactor",
            "transformers.optimization",
            {"lr": 1e-6, "relative_step": False, "scale_parameter": False},
            "step",
        ),
        ("ProdigyPlusScheduleFree", "prodigyplus", {"fused_back_pass": True, "split_groups": False}, "step_param"),
    ):
        try:
            optimizer_class = getattr(importlib.import_module(module), name)
        except ImportError as error:
            print(f"left out: {name} ({error})")
            continue
        build = partial(optimizer_class, **options)
        yield Contender(name, build, step, partial(_bytes_after_a_step, build, step))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", choices=NAMES, default="sdxl_full", help="whose shapes (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    shapes = load(args.model)
    total = sum(map(_numel, shapes))
    largest = sorted(shapes, key=_numel)[-2:]
    print(f"{args.model}: {total / 1e9:.2f} B parameters in {len(shapes)} tensors; GB of 10^9 bytes")
    weights = total * _BYTES_OF_WEIGHT / _GB
    table = Table(
        "{:<36}{:>9.2f}{:>11.2f}{:>9.2f}{:>9.2f}{:>9.2f}", "", "weights", "gradients", "work", "states", "all"
    )
    for contender in contenders():
        states = sum(map(cache(contender.state_bytes), shapes)) / _GB
        measured = largest if contender.step else largest[-1:]
        gradients, own_gradients = (
            sum(map(_numel, counted)) * _BYTES_OF_WEIGHT / _GB
            for counted in (largest if contender.step else shapes, measured)
        )
        work = max(peak_of_backward(contender, measured) / _GB - own_gradients, 0.0)
        table.row(contender.name, weights, gradients, work, states, weights + gradients + work + states)
    print(_of_slice(load(args.model, _SLICE)))


def _of_slice(shapes: list[Shape]) -> str:
    """What is alive at a time in a backward pass over a slice of the model, with steps inside."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count(p: torch.Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        alive.append(weakref.ref(p.grad))
        most = max(most, sum(gradient.nbytes for known in alive if (gradient := known()) is not None))

    contender = next(contenders())
    allocated = peak_of_backward(contender, shapes, count)
    largest = sum(sorted(map(_numel, shapes))[-2:]) * _BYTES_OF_WEIGHT
    return (
        f"{contender.name}, {sum(map(_numel, shapes)) / 1e6:.0f} M of them in {len(shapes)} tensors: at its peak a "
        f"backward pass has allocated {allocated / 1e6:.0f} MB; at most {most / 1e6:.0f} MB of gradients are alive, "
        f"where the two largest tensors have {largest / 1e6:.0f}"
    )


def peak_of_backward(
    contender: Contender, shapes: list[Shape], look: Callable[[torch.Tensor], None] | None = None
) -> int:
    """The largest number of bytes that a backward pass and the steps of some tensors allocate, gradients included.

    Args:
        contender: whose steps.
        shapes: of the tensors.
        look: called with each parameter when its gradient is there; None for nothing.
    """
    params = [_parameter(shape) for shape in shapes]
    optimizer = contender.build(params)
    for p in params:
        if look is not None:
            p.register_post_accumulate_grad_hook(look)
        if contender.step:
            p.register_post_accumulate_grad_hook(_hook(optimizer, contender.step))

    def take_step() -> None:
        # A gradient as large as the weights, and nothing else, for each of them in turn.
        sum(torch.dot(p.flatten(), p.detach().flatten()) for p in params).backward()  # type: ignore[union-attr]
        if contender.step in ("", "step_parameter"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    take_step()  # makes the states
    gc.collect()
    return peak_bytes(take_step)


def _hook(optimizer: Any, step: str) -> Callable[[torch.Tensor], None]:
    def hook(p: torch.Tensor) -> None:
        _step(optimizer, step, p)
        p.grad = None

    return hook


def _step(optimizer: Any, step: str, p: torch.Tensor) -> None:
    """Step one parameter, the only one that has a gradient."""
    if step in ("", "step"):
        optimizer.step()
    else:
        getattr(optimizer, step)(p, optimizer.param_groups[0])


def _parameter(shape: Shape) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).bfloat16())


def _ours(label: str, name: str, config: OptimizerConfig) -> Contender:
    optimizer_class = getattr(family, name)
    phase = Phase.at(1, config.warmup_steps)
    periods = config.momentum_scales if "COptim" in name else ()

    def states(shape: Shape) -> int:
        return bytes_of(torch.Size(shape), phase, config, optimizer_class._precision, periods)

    return Contender(label, partial(optimizer_class, config=config), "step_parameter", states)


def _bytes_after_a_step(build: Build, step: str, shape: Shape) -> int:
    p = _parameter(shape)
    p.grad = torch.full_like(p, 1e-3)
    optimizer = build([p])
    _step(optimizer, step, p)
    return state_bytes(optimizer)


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()

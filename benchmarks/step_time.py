"""Times of steps as ratios to torch's AdamW, with the operations and the bytes of each optimizer.

The optimizers of a set take their steps in turns, so that a slow moment of the machine hits all of them. The median is
reported, with the quartiles. A set holds as many optimizers as fit into memory; AdamW is in every set.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import contenders
from .contenders import REFERENCE, Build, Copy
from .cost import operations, state_bytes, temporary_bytes
from .models import parameters


@dataclass(frozen=True)
class Row:
    """One optimizer on one model.

    Attributes:
        name: the optimizer and its phase.
        ratio: median time of a step, as a ratio to torch's AdamW in the same set.
        low, high: the quartiles of the same.
        milliseconds: the median itself.
        operations: torch's operations in a step; native kernels are none of them.
        read_backs: how often a step waits for the device.
        state: bytes of state a parameter element.
        temporary: MiB of working memory.
        first: seconds of the first step in this phase, which makes the states and compiles what is compiled.
    """

    name: str
    ratio: float
    low: float
    high: float
    milliseconds: float
    operations: int
    read_backs: int
    state: float
    temporary: float
    first: float


def sets(rules: bool) -> Iterator[dict[str, Build]]:
    """The optimizers to compare, in sets that fit into memory together."""
    peers = contenders.peers()
    reference = {REFERENCE: peers[REFERENCE]}
    yield peers
    for name in contenders.FAMILY:
        yield {**reference, **contenders.in_phases(name)}
        if rules:
            yield {**reference, **contenders.in_phases(name, fused=False)}


def measure(shapes: list[tuple[int, ...]], builds: Mapping[str, Build], rounds: int) -> list[Row]:
    """Measure one set. All of its optimizers share parameters and gradients.

    A set that ends with one of the four also gets the time of a plain copy of the bytes that this optimizer reads.
    """
    shared = parameters(shapes)
    count = sum(p.numel() for p in shared)
    made: dict[str, Any] = {}
    firsts: dict[str, float] = {}
    for name, build in builds.items():
        made[name] = build(shared)
        firsts[name] = first_step(made[name])
    *_, last = made
    if last.startswith("Automagic"):
        made[f"copy of {last}"] = Copy(shared, made[last].state)
    seconds = interleaved({name: optimizer.step for name, optimizer in made.items()}, rounds)
    unit = statistics.median(seconds[REFERENCE])
    rows = []
    for name, optimizer in made.items():
        low, middle, high = statistics.quantiles(seconds[name], n=4)
        counted = operations(optimizer.step)
        bytes_of = (0, 0) if isinstance(optimizer, Copy) else (state_bytes(optimizer), temporary_bytes(optimizer))
        rows.append(
            Row(
                name, middle / unit, low / unit, high / unit, middle * 1e3,
                counted.counts.total(), len(counted.read_backs), bytes_of[0] / count, bytes_of[1] / 2**20,
                firsts.get(name, 0.0),
            )
        )  # fmt: skip
    return rows


def first_step(optimizer: torch.optim.Optimizer) -> float:
    """Take one step; its seconds."""
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def interleaved(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in `rounds` rounds of one step each after two unmeasured ones."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def started(build: Build, shapes: list[tuple[int, ...]]) -> Callable[[], Any]:
    """The step of an optimizer that has already taken one."""
    optimizer = build(parameters(shapes))
    optimizer.step()
    return optimizer.step


def describe(name: str, shapes: list[tuple[int, ...]]) -> str:
    """The line above a table."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    return f"{name}: {len(shapes)} tensors, {count / 1e6:.1f} M parameters, {torch.get_num_threads()} threads"

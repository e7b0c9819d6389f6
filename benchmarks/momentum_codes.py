"""How close do coded multi-scale momenta stay to exact ones, and at how many bytes?

A LoRA of rank 128 of the embedded model is trained. The scaled gradients of some of its factors are fed to exact
float32 momenta and to every way of storing the four momenta in fewer bytes. The table has the bytes an element and the
cosine between the weighted means of the coded and of the exact momenta, which is what drives the optimizer: its mean
over all steps and factors, over the first 30 steps, over the last 100, for the worst factor, and of each momentum
by itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from library.cameamp.rounding import Dither
from library.cameamp.storage import AverageFormat, Part, Scaled, StoredAverage
from library.cameamp.storage.averages import average_formats
from library.cameamp.storage.full import Full
from library.cameamp.storage.low_rank import LowRank
from library.cameamp.storage.nibbles import Nibbles
from library.cameamp.techniques import multiscale

from .arguments import add_shared
from .embedded import embedded_trainer
from .table import Table

PERIODS = (1, 5, 10, 25)
# Whose momenta can be watched, unlike those of kernels.
_BY_THE_RULES = ("--optimizer_type", "Automagic_CameAMP_COptim", "--optimizer_args", "fused=False")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, steps=200)


def run(args: argparse.Namespace) -> None:
    """Train, code and print."""
    streams = recorded(args.steps)
    table = Table(
        "{:<40}{:>7.2f}{:>8.3f}{:>10.3f}{:>10.3f}{:>14.3f}   {}",
        "momenta of periods " + ", ".join(map(str, PERIODS)),
        "bytes", "cosine", "first 30", "last 100", "worst factor", "each momentum",
    )  # fmt: skip
    for name, way in ways().items():
        results = [fidelity(stream, way(*stream.shape[2:])) for stream in streams]
        size = sum(bytes_an_element(s.shape[2:], way(*s.shape[2:])) for s in streams) / len(streams)
        means = [sum(c) / len(c) for c, _ in results]
        first = [sum(c[:30]) / 30 for c, _ in results]
        last = [sum(c[-100:]) / len(c[-100:]) for c, _ in results]
        own = [sum(o[place] for _, o in results) / len(results) for place in range(len(PERIODS))]
        each = "  ".join(f"{value:.2f}" for value in own)
        table.row(name, size, _mean(means), _mean(first), _mean(last), min(means), each)


class SignAndRankOne(AverageFormat):
    """One sign bit an element and a rank-1 magnitude from row and column means, as in SMMF (arXiv 2412.08894)."""

    suffixes = ("_signs", "_magnitude")

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        # `bytes` counts one bit for a sign; here each has a byte.
        return {"_signs": Part(torch.int8, tuple(shape)), "_magnitude": Part(torch.float32, tuple(shape))}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredAverage:
        return _SignsAndMagnitude(tensors, shape)

    def bytes(self, shape: torch.Size) -> int:
        return shape.numel() // 8 + 4 * sum(shape)


class _Unpacked(StoredAverage):
    """An average that is updated by decoding all of it and coding it again."""

    def lerp(
        self, target: Tensor, rate: float, dither: Dither, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Scaled:
        average = torch.lerp(self.read(), target, rate)
        self.write(average, dither)
        return Scaled(average, 1.0)


class _SignsAndMagnitude(_Unpacked):
    def read(self, out: Tensor | None = None) -> Tensor:
        signs, magnitude = self.tensors
        return signs * magnitude

    def write(self, stack: Tensor, dither: Dither) -> None:
        signs, magnitude = self.tensors
        size = stack.abs()
        mean = size.mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        signs.copy_(stack.sign())
        magnitude.copy_(size.mean(dim=2, keepdim=True) * size.mean(dim=1, keepdim=True) / mean)


class Nothing(AverageFormat):
    """No momentum is stored; it reads as zero."""

    suffixes = ()

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {}

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredAverage:
        return _Zero(tensors, shape)


class _Zero(_Unpacked):
    def read(self, out: Tensor | None = None) -> Tensor:
        return torch.zeros(1, self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        pass


def ways() -> dict[str, Callable[[int, int], list[AverageFormat]]]:
    """For each way of storing the four momenta, the formats of a factor of (rows, columns)."""
    return {
        "sign and rank-1 magnitude, all four": lambda *_: [SignAndRankOne()] * 4,
        "4 bits for period 1, nothing else": lambda *_: [Nibbles(), *[Nothing()] * 3],
        "low rank 4, all four": lambda r, c: [LowRank(r, c, 4)] * 4,
        "4 bits, and sign and rank-1 magnitude": lambda *_: [Nibbles(), *[SignAndRankOne()] * 3],
        "4 bits, and rank 1": lambda r, c: [Nibbles(), *[LowRank(r, c, 1)] * 3],
        "4 bits, and rank 2": lambda r, c: [Nibbles(), *[LowRank(r, c, 2)] * 3],
        "4 bits, and what rank fits *": lambda r, c: list(average_formats(PERIODS, torch.Size((r, c))).values()),
        "4 bits, and rank 8": lambda r, c: [Nibbles(), *[LowRank(r, c, 8)] * 3],
        "4 bits, all four": lambda *_: [Nibbles()] * 4,
        "float32, all four": lambda *_: [Full()] * 4,
    }


def recorded(steps: int) -> list[Tensor]:
    """Scaled gradients of some factors over a training run, each (steps, 1, rows, columns)."""
    seen: dict[tuple[int, ...], list[Tensor]] = {}
    original = multiscale.multi_scale_momentum

    def watch(sg: Tensor, *more: object) -> Tensor | None:
        if 4096 <= sg[0].numel() <= 16384:
            seen.setdefault(tuple(sg.shape[1:]), []).append(sg[:1].clone())
        return original(sg, *more)  # type: ignore[arg-type]

    multiscale.multi_scale_momentum = watch  # type: ignore[assignment]
    try:
        with embedded_trainer(128, steps // 2, *_BY_THE_RULES) as trainer:
            for _ in range(steps):
                trainer._train_step()
    finally:
        multiscale.multi_scale_momentum = original
    # LoRA downs have no gradient at the first step.
    return [torch.stack(stream[:: len(stream) // steps][1:]) for stream in seen.values()]


def fidelity(stream: Tensor, formats: list[AverageFormat]) -> tuple[list[float], list[float]]:
    """Cosine of the weighted means at each step, and the mean cosine of each momentum."""
    shape = stream.shape[2:]
    position = torch.zeros(1, dtype=torch.int32)
    states = [each.new(1, shape, stream.device) for each in formats]
    exact = [torch.zeros(1, *shape) for _ in PERIODS]
    cosines: list[float] = []
    own: list[list[float]] = [[] for _ in PERIODS]
    for step, sg in enumerate(stream, start=1):
        used = []
        for place, (period, state) in enumerate(zip(PERIODS, states)):
            if multiscale.is_due(period, step):
                exact[place].lerp_(sg, 1 - multiscale.DECAY)
                unpacked = state.lerp(sg, 1 - multiscale.DECAY, Dither(position, step))
                used.append(state.read() if unpacked is None else unpacked.factor * unpacked.stack)
            else:
                used.append(state.read())
            if step >= period:
                own[place].append(_cosine(used[-1], exact[place]))
        shares = multiscale.shares(PERIODS, [step // period for period in PERIODS])
        coded, true = (sum(share * m for share, m in zip(shares, momenta)) for momenta in (used, exact))
        cosines.append(_cosine(coded, true))  # type: ignore[arg-type]
    return cosines, [sum(values) / len(values) for values in own]


def bytes_an_element(shape: torch.Size, formats: list[AverageFormat]) -> float:
    """What the momenta of one factor of (rows, columns) take."""
    return sum(each.bytes(shape) for each in formats) / shape.numel()


def _cosine(x: Tensor, y: Tensor) -> float:
    return torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan

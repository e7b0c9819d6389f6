"""Tensor shapes of real models, and random parameters of these shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

_FOLDER = Path(__file__).with_name("shapes")

NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load(name: str, limit: int | None = None) -> list[tuple[int, ...]]:
    """The shapes of the tensors of a model that are trained, in order.

    Args:
        name: one of `NAMES`.
        limit: the largest number of elements; the tensor that would exceed it and all after it are left out.
    """
    shapes: list[tuple[int, ...]] = []
    total = 0
    for entry in json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8")):
        shape = tuple(entry)
        total += torch.Size(shape).numel()
        if limit is not None and total > limit:
            break
        shapes.append(shape)
    return shapes


def parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[torch.nn.Parameter]:
    """Random parameters with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    return list(_parameters(shapes, generator))


def _parameters(shapes: list[tuple[int, ...]], generator: torch.Generator) -> Iterator[torch.nn.Parameter]:
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        p.grad = torch.randn(shape, generator=generator) * 1e-3
        yield p

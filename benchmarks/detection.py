"""How often does the context report an edge case, on pure noise and on real trouble?

For each kind of stream and each threshold, the share of streams in which an edge case is reported. The window is full
from the start. Losses have Gaussian noise (1 + 0.1 x) or log-normal noise (sigma 0.5). Gradients are independent,
except in the streams in which they flip.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from library.cameamp.context.detection import confidence

from .table import Table

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
_ELEMENTS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--streams", type=int, default=2000, help="streams of each kind (default: %(default)s)")
    parser.add_argument("--windows", type=int, nargs="*", default=(12, 20, 50, 100), help="lengths of context_window")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    table = Table(
        "{:>6} {:<11} {:<32}" + "{:>8.1%}" * len(THRESHOLDS), "window", "noise", "share of streams seen", *THRESHOLDS
    )
    for window in args.windows:
        for kind in ("Gaussian", "log-normal"):
            for name, shares in measure(kind, window, args.streams).items():
                table.row(window, kind, name, *shares)


def noise(kind: str, streams: int, steps: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Stationary losses, (streams, steps), and their standard deviation."""
    x = torch.randn(streams, steps, generator=generator)
    if kind == "Gaussian":
        return 1 + 0.1 * x, 0.1
    return torch.exp(0.5 * x), 0.604


def cosines(streams: int, steps: int, generator: torch.Generator) -> Tensor:
    """Cosines of independent consecutive gradients, (streams, steps)."""
    return torch.randn(streams, steps, generator=generator) / _ELEMENTS**0.5


def flipping(streams: int, window: int, steps: int, generator: torch.Generator) -> Tensor:
    """Cosines of gradients that are independent at first and then flip their sign at every step, with as much noise."""
    signal = torch.randn(streams, 1, _ELEMENTS, generator=generator)
    signs = torch.tensor([(-1.0) ** n for n in range(steps)]).view(1, -1, 1)
    gradients = signal * signs + torch.randn(streams, steps, _ELEMENTS, generator=generator)
    turned = torch.cosine_similarity(gradients[:, 1:], gradients[:, :-1], dim=2)
    return torch.cat([cosines(streams, window - steps + 1, generator), turned], dim=1)


def measure(kind: str, window: int, streams: int) -> dict[str, list[float]]:
    """For each kind of stream, the share in which an edge case is reported, by threshold."""
    generator = torch.Generator().manual_seed(0)
    result: dict[str, list[float]] = {}

    def share(name: str, seen: list[Tensor]) -> None:
        highest = torch.stack(seen).amax(dim=0)
        result[name] = [(highest >= threshold).float().mean().item() for threshold in THRESHOLDS]

    losses, deviation = noise(kind, streams, window, generator)
    quiet = cosines(streams, window, generator)
    share("false alarms per step", [confidence(losses, quiet)])

    for name, scale in (("spike of 6 robust deviations", losses), ("the same of the logarithms", losses.log())):
        others = scale[:, :-1]
        median = others.median(dim=1).values
        spread = 1.4826 * (others - median.unsqueeze(1)).abs().median(dim=1).values
        spiked = torch.cat([others, (median + 6 * spread).unsqueeze(1)], dim=1)
        share(name, [confidence(spiked if scale is losses else spiked.exp(), quiet)])

    long, deviation = noise(kind, streams, 2 * window, generator)
    long[:, window:] += deviation * torch.arange(1, window + 1) / window
    many = cosines(streams, 2 * window, generator)
    every = max(1, window // 20)  # the optimizer tests at every step; twenty tests of the rise are enough here
    ends = list(range(window + every, 2 * window + 1, every))
    share("rise by a deviation a window", [confidence(long[:, e - window : e], many[:, e - window : e]) for e in ends])

    few = min(streams, 1000)
    turning = [flipping(few, window, steps, generator) for steps in range(2, 12)]
    share("flipping gradients, 10 steps", [confidence(losses[:few], window_) for window_ in turning])
    return result

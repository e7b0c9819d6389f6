"""How often the context of C-Optim sees trouble: where there is none, and where there is.

    python -m benchmarks.detection [--streams 2000]

For each kind of stream and threshold, the share of streams in which an edge case was seen. A window is full at first,
and its noise is Gaussian (1 + 0.1 x) or log-normal (sigma 0.5); gradients are independent unless they flip.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from library.cameamp.context.detection import confidence

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
_ELEMENTS = 4096


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
    """Cosines of gradients that are independent, and then flip their sign every step, noise of equal size added."""
    signal = torch.randn(streams, 1, _ELEMENTS, generator=generator)
    signs = torch.tensor([(-1.0) ** n for n in range(steps)]).view(1, -1, 1)
    gradients = signal * signs + torch.randn(streams, steps, _ELEMENTS, generator=generator)
    turned = torch.cosine_similarity(gradients[:, 1:], gradients[:, :-1], dim=2)
    return torch.cat([cosines(streams, window - steps + 1, generator), turned], dim=1)


def measure(kind: str, window: int, streams: int) -> dict[str, list[float]]:
    """For each question, the share of streams for each threshold."""
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
    every = max(1, window // 20)  # twenty looks at the rise are fewer than the optimizer takes
    ends = list(range(window + every, 2 * window + 1, every))
    share("rise by a deviation a window", [confidence(long[:, e - window : e], many[:, e - window : e]) for e in ends])

    few = min(streams, 1000)
    turning = [flipping(few, window, steps, generator) for steps in range(2, 12)]
    share("flipping gradients, 10 steps", [confidence(losses[:few], window_) for window_ in turning])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=2000, help="streams of each kind")
    parser.add_argument("--windows", type=int, nargs="*", default=(12, 20, 50, 100), help="context_window")
    args = parser.parse_args()
    print(f"{'window':>6} {'noise':11} {'share of streams seen':32}" + "".join(f"{t:>8}" for t in THRESHOLDS))
    for window in args.windows:
        for kind in ("Gaussian", "log-normal"):
            for name, shares in measure(kind, window, args.streams).items():
                print(f"{window:6} {kind:11} {name:32}" + "".join(f"{s:8.1%}" for s in shares), flush=True)


if __name__ == "__main__":
    main()

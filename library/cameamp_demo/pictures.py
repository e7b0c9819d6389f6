"""The pictures of a run: samples before and after, and the loss and learning rates over the steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .data import NEW_DIGITS, RESOLUTION
from .model import NoisePredictor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_SAMPLING_STEPS = 25
_COLUMNS = 6
_SEED = 11


@dataclass
class History:
    """The numbers of a run, step by step. They are saved with its state and continue when it is resumed.

    Attributes:
        loss: training loss of each step.
        learning_rates: for each step, (mean, smallest, largest) effective learning rate of each group.
        held_out: (step, held-out loss).
        context: for each step of a contextual optimizer, the values that explain its multiplier, by name.
    """

    loss: list[float] = field(default_factory=list)
    learning_rates: list[list[tuple[float, float, float]]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    context: list[dict[str, float]] = field(default_factory=list)


@torch.no_grad()
def sample_digits(model: NoisePredictor, device: torch.device) -> Tensor:
    """Images of the new digits, one row per digit, (rows, columns, 16, 16) in [-1, 1]. The noise is always the same."""
    generator = torch.Generator().manual_seed(_SEED)
    digits = torch.tensor(NEW_DIGITS).repeat_interleave(_COLUMNS)
    images = torch.randn(len(digits), 1, RESOLUTION, RESOLUTION, generator=generator).to(device)
    schedule = DDIMScheduler.from_config(model.schedule.config)
    schedule.set_timesteps(_SAMPLING_STEPS)
    for timestep in schedule.timesteps:
        timesteps = torch.full((len(images),), int(timestep), device=device)
        images = schedule.step(model(images, timesteps, digits.to(device)).float(), timestep, images).prev_sample
    return images.cpu().clamp(-1, 1).view(len(NEW_DIGITS), _COLUMNS, RESOLUTION, RESOLUTION)


def save_samples(before: Tensor, after: Tensor, path: Path) -> None:
    """Write the samples before and after, side by side, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    for axis, images, title in zip(axes, (before, after), ("before", "after")):
        rows = [torch.cat(list(row), dim=1) for row in images]
        axis.imshow(torch.cat(rows, dim=0).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([(index + 0.5) * RESOLUTION for index in range(len(NEW_DIGITS))], [str(d) for d in NEW_DIGITS])
    figure.suptitle("digits that only the LoRA was trained on")
    _save(figure, path)


def save_course(history: History, title: str, path: Path) -> None:
    """Write loss and effective learning rate over the steps, and the context if there is one, as PNG."""
    rows = 3 if history.context else 2
    figure, (top, bottom, *more) = plt.subplots(rows, 1, figsize=(8, 3 * rows), sharex=True)
    steps = range(1, len(history.loss) + 1)
    top.plot(steps, history.loss, color="0.8", linewidth=0.8, label="batch")
    top.plot(steps, _smoothed(history.loss), color="C0", label="batch, smoothed")
    if history.held_out:
        top.plot(*zip(*history.held_out), "o-", color="C3", label="held out")
    top.set_ylabel("loss")
    top.set_yscale("log")
    top.legend()
    for number, rates in enumerate(zip(*history.learning_rates)):
        mean, smallest, largest = zip(*rates)
        bottom.plot(steps, mean, color=f"C{number}", label=f"group {number}: mean")
        bottom.fill_between(steps, smallest, largest, color=f"C{number}", alpha=0.15, label="smallest to largest")
    bottom.set_ylabel("effective learning rate")
    bottom.set_yscale("log")
    bottom.legend()
    for axis in more:
        _draw_context(axis, history.context, len(history.loss))
    (more[-1] if more else bottom).set_xlabel("step")
    top.set_title(title)
    _save(figure, path)


def _draw_context(axis: Any, context: list[dict[str, float]], last: int) -> None:
    """Draw the multiplier and the consistency of a contextual optimizer, and a line at each edge case."""
    multipliers, consistencies, counts = (
        [values[name] for values in context] for name in ("multiplier", "consistency", "edge_cases")
    )
    steps = range(last - len(context) + 1, last + 1)
    edges = [step for step, count, before in zip(steps, counts, (0, *counts)) if count > before]
    for number, step in enumerate(edges):
        axis.axvline(step, color="0.85", linewidth=0.8, label=None if number else "edge case")
    axis.plot(steps, multipliers, color="C2", label="multiplier")
    axis.set_ylabel("multiplier")
    axis.set_yscale("log")
    right = axis.twinx()
    right.plot(steps, consistencies, color="C4", linewidth=0.8, label="gradient consistency")
    right.set_ylabel("gradient consistency")
    right.set_ylim(-1, 1)
    lines = [*axis.get_legend_handles_labels(), *right.get_legend_handles_labels()]
    axis.legend(lines[0] + lines[2], lines[1] + lines[3])


def _smoothed(values: list[float], decay: float = 0.95) -> list[float]:
    smoothed: list[float] = []
    average = 0.0
    for number, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        smoothed.append(average / (1 - decay**number))
    return smoothed


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""What imports what, which technique acts when, and what becomes of the rates? Draws pictures of the documents.

Writes to docs/images: architecture.png, phases.png, mask.png, the learning-rate mask over a run, and schedules.png, the
lengths of the contextual optimizer's steps under schedules. The last two train the embedded LoRA, for some minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from library.automagic_cameamp import Automagic_CameAMP_COptim
from library.cameamp.config import OptimizerConfig
from library.cameamp.phase import Phase
from library.cameamp.techniques import grams

from .architecture import draw
from .embedded import embedded_trainer
from .study.digits import DigitsLoRA
from .study.schedules import Schedule, constant, cosine
from .study.task import take_step

_ROOT = Path(__file__).resolve().parent.parent
_FOLDER = _ROOT / "docs" / "images"
_ENGINE = _ROOT / "library" / "cameamp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "names", nargs="*", type=_picture, metavar="picture", help=f"of {', '.join(_PICTURES)}; all by default"
    )


def run(args: argparse.Namespace) -> None:
    """Draw and write."""
    for name in args.names or _PICTURES:
        path = _FOLDER / f"{name}.png"
        _PICTURES[name](path)
        print(f"written: docs/images/{path.name}, {path.stat().st_size // 1024} KiB", flush=True)


def _picture(name: str) -> str:
    if name not in _PICTURES:
        raise argparse.ArgumentTypeError(f"unknown picture {name!r}; allowed: {', '.join(_PICTURES)}")
    return name


def architecture(path: Path) -> None:
    """What imports what in the engine."""
    for a, b in draw(_ENGINE, path):
        print(f"cycle: {a} imports {b}, which imports {a}, directly or through others", flush=True)


_WARMUP, _STEPS = 500, 1500
_DEFAULTS = OptimizerConfig(warmup_steps=_WARMUP)


def _always(step: int) -> float:
    return 1.0


def _early(step: int) -> float:
    return float(Phase.at(step, _WARMUP).early)


def _later(step: int) -> float:
    return float(not Phase.at(step, _WARMUP).early)


def _warmup(step: int) -> float:
    return float(Phase.at(step, _WARMUP).warmup)


def _fading(step: int) -> float:
    return grams.gradient_share(_DEFAULTS.beta1_decay, step)


# For each technique, how strongly it acts at a step, 0 to 1.
_TECHNIQUES: dict[str, Callable[[int], float]] = {
    "AGR": _always,
    "CAME": _always,
    "Multi-scale momentum\n(contextual)": _always,
    "Torque-Aware Momentum": _early,
    "Consistency Momentum": _later,
    "AdaBelief": _always,
    "Grams": _fading,
    "Orthogonal gradient": _early,
    "Bumps of the learning-rate mask": _warmup,
    "Cautious (if asked for)": _always,
    "Adaptive Weight Decay": _early,
    "ALLoRA (LoRA factors)": _always,
    "Multiplier (contextual)": _always,
}


def phases(path: Path) -> None:
    """Which technique acts at which step, with the default options."""
    figure, axis = plt.subplots(figsize=(9.6, 5))
    strengths = [[acts(t) for t in range(1, _STEPS + 1)] for acts in _TECHNIQUES.values()]
    extent = (0.5, _STEPS + 0.5, len(_TECHNIQUES) - 0.5, -0.5)
    axis.imshow(strengths, aspect="auto", extent=extent, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    for row in range(1, len(_TECHNIQUES)):
        axis.axhline(row - 0.5, color="white", linewidth=4)
    for step in (_WARMUP / 2, _WARMUP):
        axis.axvline(step, color="C3", linewidth=1.2)
    for left, right, name in ((0, _WARMUP / 2, "early"), (_WARMUP / 2, _WARMUP, "late\nwarm-up"),
                              (_WARMUP, _STEPS, "after the warm-up")):  # fmt: skip
        axis.text((left + right) / 2, -0.7, name, ha="center", va="bottom", color="C3")
    axis.text(
        _STEPS - 15,
        list(_TECHNIQUES).index("Grams"),
        f"fades: {_DEFAULTS.beta1_decay}^step",
        ha="right",
        va="center",
        fontsize=8,
    )
    axis.set_yticks(range(len(_TECHNIQUES)), list(_TECHNIQUES), fontsize=9)
    axis.set_xticks([1, _WARMUP // 2, _WARMUP, 1000, _STEPS])
    axis.set_xlabel(f"step, with warmup_steps = {_WARMUP}")
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    _save(figure, path)


_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_RUN_STEPS, _RUN_WARMUP, _EVERY = 400, 200, 4
_STARTS = (1e-6, 5e-4)


def mask(path: Path) -> None:
    """Percentiles of the learning-rate mask over the steps of an embedded LoRA run, for two learning rates."""
    figure, axes = plt.subplots(1, len(_STARTS), figsize=(9.6, 4), sharey=True)
    for axis, lr in zip(axes, _STARTS):
        steps, levels = mask_course(lr)
        for low, high, alpha in ((0, 6, 0.12), (1, 5, 0.2), (2, 4, 0.35)):
            label = f"{_PERCENTILES[low]} to {_PERCENTILES[high]} % of the elements"
            axis.fill_between(steps, levels[low], levels[high], color="C0", alpha=alpha, linewidth=0, label=label)
        axis.plot(steps, levels[3], color="C0", label="median")
        axis.axvline(_RUN_WARMUP, color="C3", linewidth=1.2, label="end of the warm-up")
        axis.set_title(f"lr = {lr:g}")
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        last = ", ".join(f"{level[-1]:.2e}" for level in levels)
        print(f"lr {lr:g}, after {_RUN_STEPS} steps, percentiles {_PERCENTILES}: {last}", flush=True)
    axes[0].set_ylabel("learning-rate mask")
    axes[1].legend(loc="lower right", fontsize="small")
    _save(figure, path)


def mask_course(lr: float) -> tuple[list[int], list[list[float]]]:
    """Train the embedded LoRA. Returns some steps and, for each percentile, its values at these steps."""
    shares = torch.tensor(_PERCENTILES) / 100
    steps, rows = [], []
    with embedded_trainer(16, _RUN_WARMUP, "--learning_rate", str(lr)) as trainer:
        optimizer = trainer.optimizer.optimizer
        for step in range(1, _RUN_STEPS + 1):
            trainer._train_step()
            if step == 1 or step % _EVERY == 0:
                masks = [optimizer.get_lr_mask(p).flatten() for p in trainer.lora.parameters()]
                steps.append(step)
                rows.append(torch.cat(masks).quantile(shares))
    return steps, torch.stack(rows).T.tolist()


def schedules(path: Path) -> None:
    """The lengths of the contextual optimizer's steps under schedules, and with the schedule divided out."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, len(_SCHEDULES), figsize=(12.8, 3.6), sharey=True)
    for axis, (name, schedule) in zip(axes, _SCHEDULES.items()):
        lengths = _step_lengths(schedule)
        factors = [schedule(step, _RUN_STEPS) for step in range(_RUN_STEPS)]
        steps = range(1, _RUN_STEPS + 1)
        axis.plot(steps, lengths, color="C0", linewidth=1, label="length of a step")
        found = [length / factor if factor > 0 else math.nan for length, factor in zip(lengths, factors)]
        axis.plot(steps, found, color="C1", linewidth=1, label="divided by the schedule")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("root mean square of a step")
    axes[0].legend(loc="lower right", fontsize="small")
    _save(figure, path)


def _step_lengths(schedule: Schedule) -> list[float]:
    """Train the embedded LoRA with the contextual optimizer. Returns the root mean square of each step's elements."""
    task = DigitsLoRA(0, rank=16, batch_size=8, images=1)
    named = task.named_parameters()
    optimizer = Automagic_CameAMP_COptim([p for _, p in named], warmup_steps=_RUN_WARMUP)
    optimizer.set_parameter_names({p: name for name, p in named})
    (group,) = optimizer.param_groups
    initial, lengths = group["lr"], []
    for step in range(_RUN_STEPS):
        group["lr"] = initial * schedule(step, _RUN_STEPS)
        before = [p.detach().clone() for _, p in named]
        take_step(task, named, optimizer, step)
        change = torch.cat([(p.detach() - old).flatten() for (_, p), old in zip(named, before)])
        lengths.append(change.square().mean().sqrt().item())
    return lengths


def _with_warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (0.05 * steps))


def _warm_restarts(step: int, steps: int) -> float:
    return cosine(step % (steps // 2), steps // 2)


_SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "constant_with_warmup": _with_warmup,
    "cosine": cosine,
    "cosine_with_restarts": _warm_restarts,
}


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


_PICTURES: dict[str, Callable[[Path], None]] = {
    "architecture": architecture,
    "phases": phases,
    "mask": mask,
    "schedules": schedules,
}

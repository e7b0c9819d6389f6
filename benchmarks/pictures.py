"""Three pictures of the documents: what calls what, what acts when, and how a run's learning rates spread.

    python -m benchmarks.pictures [architecture] [phases] [mask]

The last trains the embedded LoRA twice, a few minutes; the others are drawn at once. All go to docs/images.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from library.cameamp.config import OptimizerConfig
from library.cameamp.rules import Phase
from library.cameamp.techniques import grams

_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"

_HOST, _OURS, _CORE, _INNER = "#e8e8e8", "#dbe9f6", "#c6dbef", "#e5f2e0"

# What calls what: (left, bottom, width, height), colour, name, what it does.
_BOXES: dict[str, tuple[tuple[float, float, float, float], str, str, str]] = {
    "host": ((0, 8.4, 3.8, 1.2), _HOST, "sd-scripts", "its training scripts, unchanged"),
    "demo": ((4.2, 8.4, 3.6, 1.2), _OURS, "embedded trainer", "cameamp_demo/: a small LoRA, on a CPU"),
    "own": ((8.2, 8.4, 3.8, 1.2), _HOST, "your own loop", "loss.backward(), optimizer.step()"),
    "plugin": ((0, 6.5, 3.8, 1.2), _OURS, "train_network_patch.py", "sd_scripts/: options, names, loss, logs"),
    "family": ((4.2, 6.5, 7.8, 1.2), _OURS, "automagic_cameamp.py",
               "the four optimizers, OptimizerConfig, report_loss"),
    "optimizer": ((0, 4.6, 12, 1.2), _CORE, "cameamp/optimizer.py",
                  "one optimizer: groups, learning rates, the two passes of a step"),
    "around": ((0, 2.6, 2.8, 1.3), _CORE, "lora, gradients", "which are LoRA factors?\nwhich gradients are usable?"),
    "batches": ((3.05, 2.6, 2.8, 1.3), _CORE, "batches", "tensors of one shape\nbecome one stack"),
    "context": ((6.1, 2.6, 2.85, 1.3), _CORE, "context, detection", "contextual: the multiplier,\nedge cases"),
    "checkpoint": ((9.2, 2.6, 2.8, 1.3), _CORE, "checkpoint, checksum",
                   "saving; checking and\nconverting what is loaded"),
    "rules": ((0, 0.4, 3.6, 1.3), _INNER, "rules.py", "one step of one stack,\nthe techniques in their order"),
    "techniques": ((4.2, 0.4, 3.6, 1.3), _INNER, "techniques/", "one paper a file,\nfunctions of tensors"),
    "storage": ((8.4, 0.4, 3.6, 1.3), _INNER, "storage/", "how a state is kept: 32 bits,\n8 bits, 4 bits, low rank"),
}  # fmt: skip

# From the middle of an edge of one box to that of another: where on each, as shares of width and height.
_ARROWS = (
    ("plugin", (0.5, 1), "host", (0.5, 0)),
    ("demo", (0.5, 0), "family", (0.2308, 1)),
    ("own", (0.5, 0), "family", (0.7564, 1)),
    ("plugin", (1, 0.5), "family", (0, 0.5)),
    ("family", (0.5, 0), "optimizer", (0.675, 1)),
    ("optimizer", (0.1167, 0), "around", (0.5, 1)),
    ("optimizer", (0.371, 0), "batches", (0.5, 1)),
    ("optimizer", (0.6271, 0), "context", (0.5, 1)),
    ("optimizer", (0.883, 0), "checkpoint", (0.5, 1)),
    ("optimizer", (0.2438, 0), "rules", (0.8125, 1)),
    ("rules", (1, 0.5), "techniques", (0, 0.5)),
    ("batches", (0.95, 0), "storage", (0.1, 1)),
)


def architecture(path: Path) -> None:
    """Boxes and arrows of the modules."""
    figure, axis = plt.subplots(figsize=(9.6, 7))
    for (left, bottom, width, height), color, name, text in _BOXES.values():
        style = "round,pad=0,rounding_size=0.12"
        axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, facecolor=color, edgecolor="0.4"))
        middle = left + width / 2
        axis.text(middle, bottom + 0.74 * height, name, ha="center", va="center", fontsize=10, fontweight="bold")
        axis.text(middle, bottom + 0.34 * height, text, ha="center", va="center", fontsize=8.5)
    for start, start_at, end, end_at in _ARROWS:
        arrow = {"arrowstyle": "-|>", "color": "0.3"}
        axis.annotate("", xy=_point(end, end_at), xytext=_point(start, start_at), arrowprops=arrow)
    axis.set_xlim(-0.1, 12.1)
    axis.set_ylim(0.2, 9.8)
    axis.axis("off")
    _save(figure, path)


def _point(box: str, at: tuple[float, float]) -> tuple[float, float]:
    (left, bottom, width, height), *_ = _BOXES[box]
    return left + at[0] * width, bottom + at[1] * height


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
    "Learning-rate mask moves": _warmup,
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
    """Train the embedded LoRA; steps, and for each of the percentiles its values at them."""
    from accelerate.state import AcceleratorState

    from library.cameamp_demo.options import parse
    from library.cameamp_demo.trainer import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    shares = torch.tensor(_PERCENTILES) / 100
    steps, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(parse([
            "--output_dir", folder, "--learning_rate", str(lr), "--network_dim", "16", "--network_alpha", "16",
            "--optimizer_args", f"warmup_steps={_RUN_WARMUP}",
        ]))  # fmt: skip
        optimizer = trainer.optimizer.optimizer
        for step in range(1, _RUN_STEPS + 1):
            trainer._train_step()
            if step == 1 or step % _EVERY == 0:
                masks = [optimizer.get_lr_mask(p).flatten() for p in trainer.lora.parameters()]
                steps.append(step)
                rows.append(torch.cat(masks).quantile(shares))
    return steps, torch.stack(rows).T.tolist()


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


_PICTURES: dict[str, Callable[[Path], None]] = {"architecture": architecture, "phases": phases, "mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="picture", help=f"of {', '.join(_PICTURES)}; all by default")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in _PICTURES]
    if unknown:
        parser.error(f"unknown picture '{unknown[0]}'; allowed: {', '.join(_PICTURES)}")
    for name in args.names or _PICTURES:
        path = _FOLDER / f"{name}.png"
        _PICTURES[name](path)
        print(f"written: docs/images/{path.name}, {path.stat().st_size // 1024} KiB", flush=True)


if __name__ == "__main__":
    main()

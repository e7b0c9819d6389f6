"""Draw one picture of a run from its tensorboard logs: loss, learning rates, context.

python -m automagic_cameamp.sd_scripts.report LOGDIR [--output PNG]
    In a checkout the module is library.cameamp.sd_scripts.report.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..command_line import UserError, print_any_name

_Scalars = dict[str, tuple[list[int], list[float]]]


def read_logs(folder: Path) -> _Scalars:
    """The scalars of the newest run below a folder.

    Returns:
        For each tag its steps and values.

    Raises:
        UserError: there are no logs, or tensorboard is missing.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise UserError(f"reading logs needs tensorboard: pip install tensorboard ({error})") from None

    # accelerate writes a run's options as a run of its own, one folder further down.
    logs = [(path.stat().st_mtime, path) for path in folder.rglob("events.out.tfevents.*")]
    for _, path in sorted(logs, reverse=True):
        log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = log.Tags()["scalars"]
        if _of_section(tags, "loss"):
            events = {tag: log.Scalars(tag) for tag in tags}
            return {tag: ([e.step for e in values], [e.value for e in values]) for tag, values in events.items()}
    raise UserError(f"{folder}: no tensorboard logs of a training run in it or below it")


def draw(scalars: _Scalars, path: Path) -> None:
    """Write the picture as PNG; parts for which the logs have no values are left out.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UserError(f"drawing needs matplotlib: pip install matplotlib ({error})") from None

    parts = [(_draw_loss, _of_section(scalars, "loss")), (_draw_rates, _of_section(scalars, "effective_lr"))]
    parts += [(_draw_context, [tag]) for tag in _of_section(scalars, "context")]
    parts = [(draw_part, tags) for draw_part, tags in parts if tags]
    figure, axes = plt.subplots(len(parts), 1, figsize=(9, 2.6 * len(parts)), sharex=True, squeeze=False)
    for (draw_part, tags), axis in zip(parts, axes[:, 0]):
        draw_part(axis, scalars, tags)
        axis.legend(loc="upper right", fontsize="small")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 if there is nothing to draw.
    """
    print_any_name()
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.report", description=__doc__.splitlines()[0])
    parser.add_argument("logdir", type=Path, help="folder of the logs; the newest run in it is taken")
    parser.add_argument("--output", type=Path, help="the picture; by default report.png in LOGDIR")
    options = parser.parse_args(arguments)
    path = options.output or options.logdir / "report.png"
    try:
        draw(read_logs(options.logdir), path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {path}")
    return 0


def _of_section(tags: Iterable[str], section: str) -> list[str]:
    """The tags of a section, whose name ends in a number if the run has several optimizers."""
    return [tag for tag in tags if re.fullmatch(rf"{section}\d*(/.*)?", tag)]


def _draw_loss(axis: Any, scalars: _Scalars, tags: list[str]) -> None:
    for tag in tags:
        # The steps of a tag of epochs are epochs.
        if "epoch" not in tag:
            noisy = tag in ("loss", "loss/current")
            axis.plot(*scalars[tag], label=tag, color="0.8" if noisy else None, linewidth=0.8 if noisy else 1.6)
    axis.set_ylabel("loss")


def _draw_rates(axis: Any, scalars: _Scalars, tags: list[str]) -> None:
    for number, tag in enumerate(tag for tag in tags if tag.endswith("/mean")):
        group = tag.removesuffix("/mean")
        color = f"C{number % 10}"
        axis.plot(*scalars[tag], color=color, label=f"{group.partition('/')[2]}: mean")
        steps, smallest = scalars[f"{group}/smallest"]
        axis.fill_between(steps, smallest, scalars[f"{group}/largest"][1], color=color, alpha=0.15)
    axis.set_ylabel("effective learning rate")
    axis.set_yscale("log")


def _draw_context(axis: Any, scalars: _Scalars, tags: list[str]) -> None:
    for tag in tags:
        axis.plot(*scalars[tag], label=tag)
        if tag.endswith("multiplier"):
            axis.set_yscale("log")
    axis.set_ylabel(tags[0].rpartition("/")[2].replace("_", " "))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

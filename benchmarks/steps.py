"""What does a step cost in time, operations and bytes, beside other optimizers?

Prints a table for each model and writes steps.json and steps.png to the folder `--output`. The other optimizers are
those of requirements-benchmarks.txt that are installed. `sdxl_full` and `sd15_full` are cut at 100 M parameters.
`--rules` adds ours without native kernels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from .arguments import add_shared
from .models import NAMES, load
from .step_time import Row, describe, measure, sets
from .table import Table

_LIMITS = {"sdxl_full": 100_000_000, "sd15_full": 100_000_000}
_MODELS = ("sd15_lora16", "sdxl_lora16", "sdxl_lora16_te", "sdxl_full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=_MODELS, help="the models to measure")
    add_shared(parser, rounds=9, threads=2)
    parser.add_argument("--rules", action="store_true", help="also measure ours without native kernels")
    parser.add_argument("--only", default="", help="measure only the sets with a name that contains this text")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder of the files")


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Row]] = {}
    for model in args.models:
        shapes = load(model, _LIMITS.get(model))
        print(describe(model, shapes))
        table = Table(
            "{:<52}{:>7.2f}{:>15}{:>9.1f}{:>12}{:>11.2f}{:>10.1f}{:>9.1f}",
            "", "ratio", "quartiles", "ms", "operations", "state B/p", "temp MiB", "first s",
        )  # fmt: skip
        rows = tables[model] = []
        for builds in sets(args.rules):
            if not any(args.only in name for name in builds):
                continue
            known = {row.name for row in rows}
            for row in measure(shapes, builds, args.rounds):
                if row.name not in known:
                    rows.append(row)
                    table.row(
                        row.name, row.ratio, f"{row.low:.2f} - {row.high:.2f}", row.milliseconds, row.operations,
                        row.state, row.temporary, row.first,
                    )  # fmt: skip
        written = {name: [asdict(row) for row in table] for name, table in tables.items()}
        (args.output / "steps.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        draw(tables, args.output / "steps.png")
    print(f"written: {args.output / 'steps.json'}, {args.output / 'steps.png'}")


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Draw the ratios as bars, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    longest = max(len(rows) for rows in tables.values())
    figure, axes = plt.subplots(1, len(tables), figsize=(5 * len(tables), 0.3 * longest + 1), squeeze=False)
    for axis, (title, rows) in zip(axes[0], tables.items()):
        colors = ["C0" if row.name.startswith("Automagic") else "0.6" for row in rows]
        axis.barh([row.name for row in rows], [row.ratio for row in rows], color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xlabel("time of a step, AdamW foreach = 1")
        axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""All of a step's costs, beside what users would pick instead.

    python -m benchmarks [--models sd15_lora16 ...] [--rounds 9] [--fused] [--output output/benchmarks]

Prints a table for each model, and writes steps.json and steps.png. Needs the extra `benchmarks`. `sdxl_full` is
cut at 100 M parameters. `--fused` measures the compiled optimizers too, which takes minutes more to compile.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from library.cameamp.workspace import keep_freed_memory

from .models import NAMES, load
from .step_time import HEADER, Row, describe, line, measure, sets

_LIMITS = {"sdxl_full": 100_000_000, "sd15_full": 100_000_000}
_MODELS = ("sd15_lora16", "sdxl_lora16", "sdxl_lora16_te", "sdxl_full")


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Bars of the ratios, one part a model."""
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=_MODELS, help="whose shapes")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each optimizer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--fused", action="store_true", help="also the compiled optimizers")
    parser.add_argument("--only", default="", help="leave out sets none of whose names holds this")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder to write to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as ours have it, for all alike
    args.output.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Row]] = {}
    for model in args.models:
        shapes = load(model, _LIMITS.get(model))
        print(f"{describe(model, shapes)}\n{HEADER}", flush=True)
        rows = tables[model] = []
        for builds in sets(args.fused):
            if not any(args.only in name for name in builds):
                continue
            known = {row.name for row in rows}
            for row in measure(shapes, builds, args.rounds):
                if row.name not in known:
                    rows.append(row)
                    print(line(row), flush=True)
        written = {name: [asdict(row) for row in table] for name, table in tables.items()}
        (args.output / "steps.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        draw(tables, args.output / "steps.png")
    print(f"written: {args.output / 'steps.json'}, {args.output / 'steps.png'}")


if __name__ == "__main__":
    main()

"""The benchmarks' command line: python -m benchmarks NAME [options]

A benchmark is a module of this package with two functions: `add_arguments(parser)` declares its options, `run(args)`
measures and prints. The first line of its docstring is the question that it answers.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

NAMES = (
    "steps",
    "growth",
    "step_profile",
    "storage_time",
    "two_cores",
    "first_use",
    "kernels",
    "gpu",
    "lora_bytes",
    "memory",
    "in_backward",
    "in_backward_time",
    "long_runs",
    "shards",
    "fine_tuning",
    "stacking",
    "eight_bit_quality",
    "quantization_error",
    "momentum_codes",
    "detection",
    "context_course",
    "pictures",
)


def question(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing the module."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names."""
    words = sys.argv[1:] if words is None else words
    # argparse would break the lines of its own list of names.
    questions = "\n".join(f"  {name:20}{question(name)}" for name in NAMES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the optimizers. `python -m benchmarks NAME --help` explains a benchmark and its options.",
        epilog=f"benchmarks and the questions that they answer:\n{questions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(metavar="NAME", required=True, help="the benchmark to run")
    for name in NAMES:
        benchmark = benchmarks.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        # Only the benchmark that is asked for is imported: some take seconds, or need more packages.
        if name in words[:1]:
            module = import_module(f"{__package__}.{name}")
            benchmark.description = module.__doc__
            module.add_arguments(benchmark)
            benchmark.set_defaults(run=module.run)
    args = parser.parse_args(words)
    args.run(args)


if __name__ == "__main__":
    main()

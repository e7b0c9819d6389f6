"""The test suite with the oldest and the newest versions that the requirements allow: python tests/versions.py FOLDER

Makes an environment for each in FOLDER, several GB in all, runs the tests in it, and prints what ran and how it ended.
A build of torch can be chosen as for any pip: PIP_CONSTRAINT, PIP_INDEX_URL.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bootstrap import NEEDED_BY_TESTS  # noqa: E402 - it lies in the folder above

SHOWN = ("torch", "accelerate", "bitsandbytes", "diffusers", "transformers", "numpy")
NAMES = ("oldest", "newest")


def requirements(oldest: bool) -> list[str]:
    """What to install: every lower bound itself, or whatever is newest."""
    lines = [line for name in NEEDED_BY_TESTS for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    # The code runs without the tools that check it.
    wanted = [line for line in lines if line and not line.startswith(("#", "ruff", "mypy"))]
    return [re.sub(r">=([\w.]+)", r"==\1" if oldest else "", line) for line in wanted]


def run(folder: Path, name: str) -> int:
    """Make an environment and run the tests in it; their exit code."""
    python = folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    wanted = requirements(oldest=name == "oldest")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", *wanted], check=True)
    code = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    versions = subprocess.run([str(python), "-c", code, *SHOWN], capture_output=True, text=True, check=True).stdout
    status = subprocess.run([str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=ROOT).returncode
    print(f"{name}: {'passed' if status == 0 else f'FAILED ({status})'}: {versions.strip()}", flush=True)
    return status


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(prog="python tests/versions.py", description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path, help="where the environments are, or are to be")
    parser.add_argument("name", nargs="?", choices=NAMES, help="only one of them")
    args = parser.parse_args()
    return max(run(args.folder.resolve(), name) for name in ([args.name] if args.name else NAMES))


if __name__ == "__main__":
    sys.exit(main())

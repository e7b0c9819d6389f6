"""Set up this project on a fresh machine and run it. Needs nothing but Python 3.10 to 3.13 itself.

python bootstrap.py demo    make .venv, install requirements.txt, train the embedded LoRA
python bootstrap.py test    make .venv, install requirements-dev.txt, run the checks and tests

What follows the command goes to it: `python bootstrap.py demo --max_train_steps 100`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

DEMO = ["train_network_patch.py", "--config_file", "configs/embedded_lora.toml"]
CHECKS = [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."], ["-m", "mypy"]]
TESTS = ["-m", "pytest"]


def main(arguments: list[str]) -> int:
    """Run one command; its exit code is returned."""
    if not arguments or arguments[0] not in ("demo", "test"):
        print(__doc__)
        return 2
    if sys.version_info < (3, 10):  # noqa: UP036 - a newer Python than the one at hand is what this asks for
        print(f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "demo":
            install("requirements.txt")
            run([*DEMO, *rest])
        else:
            install("requirements-dev.txt")
            for check in CHECKS:
                run(check)
            run([*TESTS, *rest])
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def install(requirements: str) -> None:
    """Make the virtual environment and install what a file lists, once for each content of the requirements."""
    if not runs("-m", "pip", "--version"):
        print(f"making {VENV}")
        # One that lacks nothing but pip, as other tools make them, only gets that; one that does not run is made anew.
        clear = [] if runs("-c", "") else ["--clear"]
        subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)], check=True)
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("requirements*.txt")))).hexdigest()
    stamp = VENV / f"{requirements}.installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing {requirements}; the first time this downloads PyTorch, which takes a while")
    run(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements])
    stamp.write_text(wanted, encoding="utf-8")


def runs(*arguments: str) -> bool:
    """Whether the virtual environment's Python is there and runs something without an error."""
    return PYTHON.exists() and subprocess.run([str(PYTHON), *arguments], capture_output=True).returncode == 0


def run(arguments: list[str]) -> None:
    """Run the virtual environment's Python in the project's folder."""
    process = subprocess.Popen([str(PYTHON), *arguments], cwd=ROOT)
    while True:
        try:
            if process.wait() != 0:
                raise subprocess.CalledProcessError(process.returncode, arguments)
            return
        except KeyboardInterrupt:
            # The child got it too, and may want to save what it has; it ends by itself.
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

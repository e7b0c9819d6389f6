"""Set up this project on a fresh machine and run it. Needs nothing but Python 3.10 to 3.14 itself.

python bootstrap.py demo    make .venv, install what the demo needs, train the embedded LoRA
python bootstrap.py test    make .venv, install what the tests need, run the checks and tests

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
NEEDED_BY_DEMO = ["requirements.txt", "requirements-kernels.txt", "requirements-demo.txt"]
NEEDED_BY_TESTS = [*NEEDED_BY_DEMO, "requirements-dev.txt"]
CHECKS = [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."], ["-m", "mypy"]]
# Two at a time, which most machines have the memory for; a module's tests share what they set up.
TESTS = ["-m", "pytest", "--numprocesses", "2", "--dist", "loadfile"]


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
            install(NEEDED_BY_DEMO)
            run([*DEMO, *rest])
        else:
            install(NEEDED_BY_TESTS)
            for check in CHECKS:
                run(check)
            run([*TESTS, *rest])
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def install(files: list[str]) -> None:
    """Make the virtual environment and install what the files list; again only when a file of requirements changes."""
    if not runs("-m", "pip", "--version"):
        print(f"making {VENV}")
        # An environment that other tools made may only lack pip, which is added; one that does not run is made anew.
        clear = [] if runs("-c", "") else ["--clear"]
        subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)], check=True)
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("requirements*.txt")))).hexdigest()
    stamp = VENV / f"{files[-1]}.installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing {', '.join(files)}; the first time this downloads PyTorch, which takes a while")
    options = [word for name in files for word in ("-r", name)]
    run(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options])
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
            # The child got it too. It may be saving its state, and ends by itself.
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Scripts that are run as `python script` runs them, without waiting for what takes seconds to import.

On Linux one process has imported that, and each run is a fork of it. Elsewhere, and where the interpreter is to be
started in another way, each run is a new process.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

# None of them starts a thread, which a fork would lack.
_IMPORTED = ["torch", "accelerate", "diffusers.optimization", "numba"]
_TIMEOUT = 300


def run(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command line in a folder, with these environment variables alone; what it wrote is captured."""
    interpreter, script, *words = command
    as_here = all(variables[name] == os.environ.get(name) for name in variables if name.startswith("PYTHON"))
    if sys.platform != "linux" or interpreter != sys.executable or script.startswith("-") or not as_here:
        return subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    with tempfile.TemporaryDirectory() as written:
        files = [str(Path(written) / name) for name in ("stdout", "stderr")]
        server = _server()
        print(json.dumps([script, words, str(folder), dict(variables), files]), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the process that runs scripts has ended"
        stdout, stderr = (Path(file).read_text("utf-8") for file in files)
        return subprocess.CompletedProcess(command, json.loads(answer), stdout, stderr)


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    for name in _IMPORTED:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _become(*json.loads(line))
            return
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(script: str, words: list[str], folder: str, variables: dict[str, str], files: list[str]) -> None:
    signal.alarm(_TIMEOUT)
    for number, file in enumerate((os.devnull, *files)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _serve()

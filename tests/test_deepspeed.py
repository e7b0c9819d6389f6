"""DeepSpeed itself, where it is installed: ZeRO is refused by its name, also through accelerate's config."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from documents import ROOT

if not all(map(find_spec, ("deepspeed", "accelerate", "transformers"))):
    pytest.skip("needs deepspeed, and what accelerate wants beside it", allow_module_level=True)

PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
ON_A_CPU = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "ACCELERATE_USE_DEEPSPEED": "true", "OMP_NUM_THREADS": "1"}
SCRIPT = ROOT / "tests" / "trainers" / "with_deepspeed.py"


@pytest.mark.parametrize(
    ("stage", "end"),
    [
        (0, "trained"),
        (1, "refused: parameter group 0 has 1 vectors for its 4 parameters; DeepSpeed ZeRO flattens parameters"),
        (2, "refused: parameter group 0 has 1 vectors for its 4 parameters; DeepSpeed ZeRO flattens parameters"),
        (3, "refused: a parameter of shape (212,) belongs to DeepSpeed; DeepSpeed ZeRO flattens parameters"),
    ],
)
def test_zero_is_refused(stage, end):
    command = [sys.executable, str(SCRIPT), str(stage), "Automagic_CameAMP_COptim8bit"]
    environment = {**os.environ, **PROCESS, **ON_A_CPU}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert any(line.startswith(end) for line in run.stdout.splitlines()), run.stdout + run.stderr

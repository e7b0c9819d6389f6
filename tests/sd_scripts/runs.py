"""Training runs inside the real sd-scripts, each in a process of its own, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = str(ROOT / "tests" / "sd_scripts" / "tiny_network.py")
TINY_SDXL = str(ROOT / "tests" / "sd_scripts" / "tiny_sdxl.py")
TINY_FLUX = str(ROOT / "tests" / "sd_scripts" / "tiny_flux.py")

SD_SCRIPTS = os.environ.get("SD_SCRIPTS_DIR", "")
SD15 = os.environ.get("SD15_DIR", "")
MISSING = [name for name in ("cv2", "torchvision", "voluptuous") if importlib.util.find_spec(name) is None]

needs_sd15 = pytest.mark.skipif(not SD15, reason="SD15_DIR is not set: no full-size model to train")


def skip_without_sd_scripts():
    """Skip a whole module of tests if there is no sd-scripts to run in."""
    if not SD_SCRIPTS:
        pytest.skip("SD_SCRIPTS_DIR is not set: no sd-scripts to run in", allow_module_level=True)
    if MISSING:
        pytest.skip(f"sd-scripts' requirements are not installed: {', '.join(MISSING)}", allow_module_level=True)


def start(*command, folder=ROOT, code=0, **environment):
    """Run Python with a command line; it must end with an exit code."""
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == code, done.stderr[-3000:]
    # sd-scripts breaks the lines of its log.
    done.log = re.sub(r"\s+", " ", done.stderr)
    return done


def run(*arguments, program=(), **environment):
    """Run the plugin of this checkout; `program` is what starts it in place of Python alone."""
    return start(*program, ROOT / "train_network_patch.py", *arguments, **environment)


def ours(output, name="Automagic_CameAMP", steps=4, *more, options=()):
    """The options of a run with one of these optimizers."""
    return [
        "--output_dir", str(output), "--optimizer_type", name, "--max_train_steps", str(steps),
        "--learning_rate", "1e-4", "--network_module", "networks.lora",
        *(["--optimizer_args", *options] if options else []), *more,
    ]  # fmt: skip


def sdxl(common, output, *more, name="Automagic_CameAMP_COptim", steps=4, groups=3):
    """The options of a run of all weights of a tiny SDXL, with several optimizers."""
    more = ("--train_script", TINY_SDXL, "--fused_optimizer_groups", str(groups), *more)
    return all_weights(common, output, *more, name=name, steps=steps)


def all_weights(common, output, *more, name="Automagic_CameAMP_COptim", steps=4):
    """The options of a run of all weights of a model."""
    words = common[: common.index("--network_dim")]
    return [
        *words, "--output_dir", str(output), "--optimizer_type", name, "--max_train_steps", str(steps),
        "--learning_rate", "1e-4", "--optimizer_args", "warmup_steps=6", "momentum_scales=(1,2,3)", "--save_state",
        *more,
    ]  # fmt: skip


def sd15_arguments(output):
    """The options of a run with the full-size model."""
    return [
        "--pretrained_model_name_or_path", f"{SD15}/model", "--tokenizer_cache_dir", f"{SD15}/tokenizers",
        "--resolution", "64,64", "--output_dir", str(output), "--output_name", "a", "--learning_rate", "1e-4",
        "--mixed_precision", "no", "--cache_latents", "--max_data_loader_n_workers", "0", "--save_state", "--seed", "1",
        "--logging_dir", str(output / "logs"),
    ]  # fmt: skip

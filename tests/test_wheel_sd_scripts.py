"""The wheel in the real sd-scripts: its unchanged scripts with a dotted path, and the plugin as a module.

What it takes to run is said in test_sd_scripts.py. The environment needs setuptools too, which builds the wheel.
"""

from __future__ import annotations

import os

import pytest
import torch
from logs import read_scalars
from safetensors import safe_open
from safetensors.torch import load_file
from sd_scripts.data import make_data
from sd_scripts.runs import (
    ROOT,
    SD15,
    SD_SCRIPTS,
    TINY,
    needs_sd15,
    ours,
    run,
    sd15_arguments,
    skip_without_sd_scripts,
    start,
)

from library.cameamp.command_line import OWN_OPTIMIZERS

skip_without_sd_scripts()

LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
PLUGIN = ("-m", "automagic_cameamp.sd_scripts")


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def stock(site, *words, **more):
    """Run a script of sd-scripts itself, or one that needs its modules, with the wheel installed and no plugin."""
    return start(*words, PYTHONPATH=f"{site}{os.pathsep}{SD_SCRIPTS}", **more)


def dotted(name):
    return f"automagic_cameamp.{name}"


def logged_optimizer(output):
    """What the metadata of a LoRA says of its optimizer."""
    with safe_open(str(output / "a.safetensors"), "pt") as file:
        return file.metadata()["ss_optimizer"]


def saved_state(output):
    return torch.load(output / "a-state" / "optimizer.bin", weights_only=True)


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_an_unpatched_host_trains_saves_and_resumes(name, site, tmp_path, common, monkeypatch):
    """A resumed run ends bit for bit where an uninterrupted one does."""
    options = ["warmup_steps=3", *(["momentum_scales=(1,2)"] if "COptim" in name else [])]
    more = ("--network_dim", "32", "--network_train_unet_only", "--save_state")
    for output, steps, resume in (
        ("straight", 6, ()),
        ("half", 3, ()),
        ("resumed", 6, ("--resume", tmp_path / "half" / "a-state", "--skip_until_initial_step", "--first_batch", 3)),
    ):
        words = ours(tmp_path / output, dotted(name), steps, *more, *resume, options=options)
        stock(site, TINY, *common, *words, folder=tmp_path)
    straight, resumed = (load_file(str(tmp_path / output / "a.safetensors")) for output in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    written = logged_optimizer(tmp_path / "resumed")
    path, _, arguments = written.partition("(")
    assert arguments == ",".join(options).replace("(1,2)", "(1, 2)") + ")"
    # In an environment with the wheel the path leads to the class.
    module, _, class_name = path.rpartition(".")
    code = f"import {module}; print({module}.{class_name}.__qualname__)"
    assert stock(site, "-c", code, folder=tmp_path).stdout.strip() == name


@pytest.mark.parametrize("first", ["wheel", "checkout"])
def test_a_run_changes_between_wheel_and_checkout(first, site, tmp_path, common):
    def from_wheel(*words):
        stock(site, *PLUGIN, "--sd_scripts", SD_SCRIPTS, *words, folder=tmp_path)

    starts = [from_wheel, run] if first == "wheel" else [run, from_wheel]
    name = OWN_OPTIMIZERS[-1]
    more = ("--train_script", TINY, *common, "--network_dim", "32", "--network_train_unet_only", "--save_state")
    for output, start_run, steps, resume in (
        ("half", starts[0], 3, ()),
        ("same", starts[0], 6, (tmp_path / "half" / "a-state",)),
        ("other", starts[1], 6, (tmp_path / "half" / "a-state",)),
    ):
        resumed = ["--resume", str(*resume), "--skip_until_initial_step", "--first_batch", "3"] if resume else []
        start_run(*more, *ours(tmp_path / output, name, steps, *resumed, options=["warmup_steps=4"]))
    same, other = (load_file(str(tmp_path / output / "a.safetensors")) for output in ("same", "other"))
    assert all(torch.equal(value, other[key]) for key, value in same.items())
    modules = {"wheel": "automagic_cameamp", "checkout": "library.automagic_cameamp"}
    assert logged_optimizer(tmp_path / "same").startswith(f"{modules.pop(first)}.{name}(")
    assert logged_optimizer(tmp_path / "other").startswith(f"{modules.popitem()[1]}.{name}(")


@pytest.mark.parametrize("folder", ["elsewhere", "checkout"])
def test_the_plugin_as_a_module_with_workers_that_are_spawned(folder, site, tmp_path, common):
    words = ours(tmp_path, "library.automagic_cameamp.Automagic_CameAMP_COptim", 2, options=["warmup_steps=2"])
    done = start(
        *LAUNCH, *PLUGIN, "--sd_scripts", SD_SCRIPTS, "--train_script", TINY, *common, *words,
        "--logging_dir", tmp_path / "logs", "--max_data_loader_n_workers", "2", "--spawn_workers",
        folder=ROOT if folder == "checkout" else tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert "workers were spawned" in done.stdout
    assert logged_optimizer(tmp_path) == "automagic_cameamp.Automagic_CameAMP_COptim(warmup_steps=2)"
    scalars = read_scalars(tmp_path / "logs")
    assert {"effective_lr/unet/mean", "context/multiplier"} <= set(scalars)


NETWORK = ("--network_module", "networks.lora", "--network_dim", "4", "--network_train_unet_only")


def sd15_run(output, steps, optimizer_type):
    """The options of a run of `train_network.py` with the full-size model, resumed after the first one."""
    resume = ("--resume", output / "a-state", "--skip_until_initial_step") if (output / "a-state").exists() else ()
    return [
        "--train_data_dir", f"{SD15}/data", *sd15_arguments(output), *NETWORK, "--max_train_steps", steps,
        "--optimizer_type", optimizer_type, "--optimizer_args", "warmup_steps=2", *resume,
    ]  # fmt: skip


@needs_sd15
def test_a_lora_of_sd15_from_the_unpatched_script_to_the_plugin_and_back(site, tmp_path):
    name = OWN_OPTIMIZERS[-1]
    script = f"{SD_SCRIPTS}/train_network.py"
    stock(site, *LAUNCH, script, *sd15_run(tmp_path, 2, dotted(name)), folder=tmp_path)
    assert {state["step"] for state in saved_state(tmp_path)["state"].values()} == {2}
    assert logged_optimizer(tmp_path) == f"automagic_cameamp.{name}(warmup_steps=2)"
    plugin = (*LAUNCH, *PLUGIN, "--sd_scripts", SD_SCRIPTS)
    done = start(*plugin, *sd15_run(tmp_path, 3, name), folder=tmp_path, PYTHONPATH=str(site))
    assert "384 of 384 parameters are LoRA factors" in done.log
    stock(site, *LAUNCH, script, *sd15_run(tmp_path, 4, dotted(name)), folder=tmp_path)
    assert {state["step"] for state in saved_state(tmp_path)["state"].values()} == {4}
    assert logged_optimizer(tmp_path) == f"automagic_cameamp.{name}(warmup_steps=2)"

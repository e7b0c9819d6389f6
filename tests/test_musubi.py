"""The optimizers in the real musubi-tuner: its optimizer, scheduler, networks and states, with the wheel installed.

Set MUSUBI_DIR to a checkout of kohya-ss/musubi-tuner and run pytest in an environment that has its requirements.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.cameamp.command_line import OWN_OPTIMIZERS

MUSUBI = os.environ.get("MUSUBI_DIR", "")
NEEDED = ("accelerate", "av", "cv2", "diffusers", "easydict", "einops", "toml", "torchvision", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if not MUSUBI:
    pytest.skip("MUSUBI_DIR is not set: no musubi-tuner to run in", allow_module_level=True)
if MISSING:
    pytest.skip(f"musubi-tuner's requirements are not installed: {', '.join(MISSING)}", allow_module_level=True)

RUN = Path(__file__).parent / "trainers" / "musubi_run.py"

# The module of each network, its options, and whether its factors are known by their shapes: musubi-tuner gives no
# names, and the matrices of a LoKr could be anything.
NETWORKS = {
    "lora": ("lora_zimage", [], True),
    "loraplus": ("lora_zimage", ["loraplus_lr_ratio=4"], True),
    "loha": ("loha", [], True),
    "lokr": ("lokr", ["factor=4"], False),
}


@pytest.fixture(scope="module")
def ends(site, tmp_path_factory):
    """The folders of all runs of an optimizer: each network straight, half and resumed, from one process."""
    done = {}

    def made(optimizer):
        if optimizer not in done:
            done[optimizer] = folder = tmp_path_factory.mktemp(optimizer)
            runs = [words for network in NETWORKS for words in runs_of(folder, optimizer, network)]
            (folder / "runs.json").write_text(json.dumps(runs), "utf-8")
            path = os.pathsep.join([str(site), str(Path(MUSUBI, "src").resolve())])
            environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            words = [sys.executable, str(RUN), str(folder / "runs.json")]
            ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
            assert ran.returncode == 0, ran.stderr[-3000:]
        return done[optimizer]

    return made


def runs_of(folder, optimizer, network):
    module, network_options, _ = NETWORKS[network]
    options = ["betas=0.8,0.99,0.999", "warmup_steps=5"]
    if "COptim" in optimizer:
        options.append("momentum_scales=1,2,3")
    shared = [
        "--optimizer_type", f"automagic_cameamp.{optimizer}", "--optimizer_args", *options, "--learning_rate", "1e-4",
        "--network_module", f"musubi_tuner.networks.{module}", "--network_dim", "4", "--output_name", "a",
        "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2", "--mixed_precision", "no", "--sdpa",
        "--max_data_loader_n_workers", "0",
        *(["--network_args", *network_options] if network_options else []),
    ]  # fmt: skip
    here = folder / network
    half = str(here / "half" / "a-state")
    for kind, steps, more in (("straight", 8, []), ("half", 4, []), ("resumed", 8, ["--resume", half])):
        yield [*shared, "--output_dir", str(here / kind), "--max_train_steps", str(steps), *more]


def found(folder):
    return json.loads((folder / "run.json").read_text("utf-8"))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OWN_OPTIMIZERS)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(ends, optimizer, network):
    folder = ends(optimizer) / network
    straight, resumed = folder / "straight", folder / "resumed"
    before, weights = load_file(str(folder / "half" / "a.safetensors")), load_file(str(straight / "a.safetensors"))
    assert any(not torch.equal(value, before[key]) for key, value in weights.items()), "nothing was trained"
    again = load_file(str(resumed / "a.safetensors"))
    assert weights.keys() == again.keys()
    assert [key for key, value in weights.items() if not torch.equal(value, again[key])] == []
    saved, resaved = (torch.load(f / "a-state" / "optimizer.bin", weights_only=True) for f in (straight, resumed))
    assert {state["step"] for state in saved["state"].values()} == {8}
    for key, state in saved["state"].items():
        for entry, value in state.items():
            other = resaved["state"][key][entry]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, (key, entry)


@pytest.mark.parametrize("optimizer", OWN_OPTIMIZERS)
def test_the_options_given_as_text_arrive(ends, optimizer):
    run = found(ends(optimizer) / "lora" / "straight")
    assert run["name"] == f"automagic_cameamp.{optimizer}"
    assert run["betas"] == [0.8, 0.99, 0.999]


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_taken_for_lora_factors(ends, network):
    run = found(ends(OWN_OPTIMIZERS[0]) / network / "straight")
    assert run["factors"] == (run["parameters"] if NETWORKS[network][2] else 0)
    assert run["parameters"] > 0


def test_lora_plus_keeps_its_rates(ends):
    saved = torch.load(
        ends(OWN_OPTIMIZERS[0]) / "loraplus" / "straight" / "a-state" / "optimizer.bin", weights_only=True
    )
    assert [group["initial_lr"] for group in saved["param_groups"]] == [1e-4, 4e-4]

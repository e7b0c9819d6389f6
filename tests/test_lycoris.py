"""LyCORIS' networks in the real sd-scripts, and options of sd-scripts that change what reaches an optimizer.

What it takes to run is said in test_sd_scripts.py; LyCORIS' own runs need the package `lycoris_lora` too.
"""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from sd_scripts.data import make_data
from sd_scripts.runs import ROOT, TINY, ours, run, skip_without_sd_scripts

from library.cameamp.lora import find_factors

skip_without_sd_scripts()

NETWORKS = {
    "lokr": ["algo=lokr", "factor=4"],
    "loha": ["algo=loha"],
    "dora": ["algo=lora", "dora_wd=True"],
    "conv": ["algo=locon", "conv_dim=2", "conv_alpha=1"],
}
PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D"]
unet_target_name = []
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
text_encoder_target_name = []
"""
EIGHT_BITS = "Automagic_CameAMP_COptim8bit"
OPTIONS = ["warmup_steps=4", "momentum_scales=(1,2,3)"]

# Of networks without names, the options, and how many of the parameters of each layer are factors, if they are known.
SHAPES = {
    "lora": ({"algo": "lora"}, 2, 2),
    "glora": ({"algo": "glora"}, 4, 4),
    "loha": ({"algo": "loha"}, 4, 4),
    "dora": ({"algo": "lora", "dora_wd": True}, 3, 2),
    "loha and dora": ({"algo": "loha", "dora_wd": True}, 5, 4),
    "lokr": ({"algo": "lokr", "factor": 4}, 3, 0),
}

needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="lycoris_lora is not installed: no LyCORIS to train"
)


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def many(folder, common, runs):
    """Several runs of the small models in one process."""
    file = folder / "runs.json"
    file.write_text(json.dumps([[*common, *more] for more in runs]), "utf-8")
    return run("--train_script", TINY, "--runs", str(file))


def saved_state(folder):
    return torch.load(folder / "a-state" / "optimizer.bin", weights_only=True)


def assert_resumed(straight, resumed, half):
    """The second run ended with the weights and the states of the first, and went on from the third."""
    weights, again, before = (load_file(str(folder / "a.safetensors")) for folder in (straight, resumed, half))
    assert weights.keys() == again.keys()
    assert [key for key, value in weights.items() if not torch.equal(value, again[key])] == []
    assert any(not torch.equal(value, before[key]) for key, value in weights.items()), "nothing was trained"
    states, other = saved_state(straight)["state"], saved_state(resumed)["state"]
    assert states.keys() == other.keys()
    for key, state in states.items():
        for entry, value in state.items():
            same = torch.equal(value, other[key][entry]) if torch.is_tensor(value) else value == other[key][entry]
            assert same, (key, entry)


@needs_lycoris
@pytest.mark.parametrize("network", SHAPES)
def test_factors_without_names(network):
    from lycoris import LycorisNetwork, create_lycoris

    options, parameters, factors = SHAPES[network]
    layers = [torch.nn.Linear(64, 64), torch.nn.Linear(96, 64), torch.nn.Linear(64, 256), torch.nn.Conv2d(32, 48, 3)]
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    made = create_lycoris(torch.nn.Sequential(*layers), 1.0, linear_dim=4, linear_alpha=4, **options)
    made.apply_to()
    groups = [list(made.parameters())]
    assert len(groups[0]) == parameters * len(layers)
    found = find_factors(groups, {})
    assert len(found) == factors * len(layers)
    assert {p for name, p in made.named_parameters() if "dora_scale" not in name} >= found


@pytest.fixture(scope="module")
def lycoris_runs(tmp_path_factory, common):
    """The folder of the runs of all networks: straight, half and resumed."""
    folder = tmp_path_factory.mktemp("lycoris")
    (folder / "preset.toml").write_text(PRESET, "utf-8")
    runs = []
    for network, options in NETWORKS.items():
        shared = ["--save_state", "--network_args", *options, f"preset={folder / 'preset.toml'}"]
        here = folder / network
        resume = ["--resume", str(here / "half" / "a-state"), "--skip_until_initial_step", "--first_batch", "3"]
        for kind, steps, more in (("straight", 6, []), ("half", 3, []), ("resumed", 6, resume)):
            words = ours(here / kind, EIGHT_BITS, steps, *shared, *more, options=OPTIONS)
            words[words.index("networks.lora")] = "lycoris.kohya"
            runs.append(words)
    many(folder, common, runs)
    return folder


@needs_lycoris
@pytest.mark.parametrize("network", NETWORKS)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(lycoris_runs, network):
    here = lycoris_runs / network
    assert_resumed(here / "straight", here / "resumed", here / "half")


@needs_lycoris
@pytest.mark.parametrize("network", NETWORKS)
def test_every_factor_of_lycoris_has_its_row_scaling_and_nothing_else(lycoris_runs, network):
    """`row_scaling` stands in the checkpoint of what ALLoRA acts on. DoRA's scales are no factors."""
    here = lycoris_runs / network / "straight"
    weights = load_file(str(here / "a.safetensors"))
    factors = [key for key, value in weights.items() if "dora_scale" not in key and "alpha" not in key]
    scaled = [state for state in saved_state(here)["state"].values() if "row_scaling" in state]
    assert len(scaled) == len(factors) > 0
    assert any("dora_scale" in key for key in weights) == (network == "dora")


# The host's options ---------------------------------------------------------------------------------------------------


def test_accumulated_batches_resume_bit_for_bit(tmp_path, common):
    """The host is not told to skip: with accumulation it would count what it skips as steps."""
    more = ["--save_state", "--gradient_accumulation_steps", "2", "--network_dim", "32"]
    resume = ["--resume", str(tmp_path / "half" / "a-state"), "--first_batch", "8"]
    runs = [("straight", 8, []), ("half", 4, []), ("resumed", 8, resume)]
    many(tmp_path, common, [ours(tmp_path / f, EIGHT_BITS, n, *more, *words, options=OPTIONS) for f, n, words in runs])
    assert_resumed(tmp_path / "straight", tmp_path / "resumed", tmp_path / "half")
    assert {state["step"] for state in saved_state(tmp_path / "straight")["state"].values()} == {8}


def test_a_unet_lr_of_0_trains_the_text_encoder_alone(tmp_path, common):
    words = ours(tmp_path, EIGHT_BITS, 3, "--save_state", "--unet_lr", "0", "--text_encoder_lr", "1e-4")
    many(tmp_path, common, [words])
    trained = {
        key for key, value in load_file(str(tmp_path / "a.safetensors")).items() if "lora_up" in key and value.any()
    }
    assert trained
    assert all(key.startswith("lora_te") for key in trained)


def test_full_fp16(tmp_path, common):
    """Weights, gradients and a scale that is far too large at first: the steps it costs are not taken."""
    script = ROOT / "tests" / "trainers" / "fp16_network.py"
    words = ours(tmp_path, EIGHT_BITS, 40, "--save_state", "--full_fp16", "--mixed_precision", "fp16", options=OPTIONS)
    run("--train_script", script, *common, *words)
    weights = load_file(str(tmp_path / "a.safetensors"))
    ups = [value for key, value in weights.items() if "lora_up" in key]
    assert all(value.isfinite().all() for value in weights.values())
    assert all(value.any() for value in ups)
    steps = {state["step"] for state in saved_state(tmp_path)["state"].values()}
    assert len(steps) == 1
    assert 5 < steps.pop() < 40
    assert math.isfinite(torch.load(tmp_path / "a-state" / "scaler.pt", weights_only=True)["scale"])

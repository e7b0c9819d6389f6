"""The plugin inside the real sd-scripts: its parsers, networks, training loop, states and logs.

Set SD_SCRIPTS_DIR to a checkout of kohya-ss/sd-scripts and run pytest in an environment that has its requirements.
SD15_DIR may name a folder with a full-size SD 1.5 (`model`, `tokenizers`, `data`), for the runs of whole scripts.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from logs import read_scalars
from safetensors import safe_open
from safetensors.torch import load_file
from sd_scripts.data import make_data
from sd_scripts.runs import (
    ROOT,
    SD15,
    SD_SCRIPTS,
    TINY,
    TINY_FLUX,
    TINY_SDXL,
    all_weights,
    needs_sd15,
    ours,
    run,
    sd15_arguments,
    sdxl,
    skip_without_sd_scripts,
    start,
)

import library
from library.automagic_cameamp import OptimizerConfig
from library.cameamp.command_line import OWN_OPTIMIZERS
from library.cameamp.config import OPTION_NAMES
from library.cameamp.parameters import names_of
from library.cameamp.sd_scripts.rates import RATES

skip_without_sd_scripts()

NETWORK_SCRIPTS = [
    "train_network", "sdxl_train_network", "sd3_train_network", "flux_train_network", "lumina_train_network",
    "anima_train_network", "hunyuan_image_train_network",
]  # fmt: skip
FULL_SCRIPTS = ["fine_tune", "sdxl_train", "sd3_train", "flux_train"]


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train_util():
    """sd-scripts' own, with the plugin in it."""
    from library.cameamp.sd_scripts.packages import join
    from library.cameamp.sd_scripts.plugin import Plugin

    join(Path(SD_SCRIPTS).resolve())
    module = importlib.import_module("library.train_util")
    Plugin().install(module)
    return module


# Packages and parsers -----------------------------------------------------------------------------------------------


def test_no_module_of_one_package_hides_one_of_the_other(train_util):
    ours, theirs = ({path.stem for path in Path(folder).iterdir()} for folder in library.__path__[:2])
    assert ours & theirs <= {"__init__", "__pycache__"}


@pytest.mark.parametrize("script", NETWORK_SCRIPTS + FULL_SCRIPTS)
def test_every_script_resolves_our_optimizers(train_util, script, tmp_path, monkeypatch):
    parser = importlib.import_module(script).setup_parser()
    assert not {action.dest for action in parser._actions} & set(OPTION_NAMES), "an option of ours is one of theirs"
    file = tmp_path / "run.toml"
    file.write_text('optimizer_type = "automagic_CAMEAMP"\n[optimizer_config]\nwarmup_steps = 7\n', "utf-8")
    argv = ["--config_file", str(file), "--learning_rate", "1e-4"]
    argv += ["--optimizer_args", "lr_bump=1e-5", "betas=0.7,0.99,0.999"]
    monkeypatch.setattr(sys, "argv", [script, *argv])
    args = train_util.read_config_from_file(parser.parse_args(argv), parser)
    p = torch.nn.Parameter(torch.zeros(2, 2))
    name, options, optimizer = train_util.get_optimizer(args, trainable_params=[{"params": [p], "lr": 2e-4}])
    assert name == "library.automagic_cameamp.Automagic_CameAMP"
    full = script in FULL_SCRIPTS
    own = "warmup_steps=7,lr_bump=1e-05,betas=(0.7, 0.99, 0.999)"
    assert options == own + (",full_finetune=True" if full else "")
    betas = (0.7, 0.99, 0.999)
    assert optimizer.config == OptimizerConfig(lr=1e-4, warmup_steps=7, lr_bump=1e-5, betas=betas, full_finetune=full)


@pytest.mark.parametrize(
    "script", NETWORK_SCRIPTS + FULL_SCRIPTS + ["anima_train", "train_db", "sdxl_train_control_net"]
)
def test_every_learning_rate_of_a_script_is_held_against_the_bounds(train_util, script):
    names = {action.dest for action in importlib.import_module(script).setup_parser()._actions}
    rates = {name for name in names if re.search(r"(^|_)lr(_|$)|learning_rate", name)}
    no_rates = {name for name in rates if re.match(r"lr_(scheduler|warmup|decay)", name)}
    assert rates - no_rates <= set(RATES)


@pytest.mark.parametrize("script", NETWORK_SCRIPTS + FULL_SCRIPTS)
@pytest.mark.parametrize("written", [(), ("--optimizer_type", "AdamW8bit"), ("--optimizer_type", "Prodigy")])
def test_every_other_optimizer_stays(train_util, script, written, monkeypatch):
    parser = importlib.import_module(script).setup_parser()
    monkeypatch.setattr(sys, "argv", [script, *written])
    args = train_util.read_config_from_file(parser.parse_args(list(written)), parser)
    p = torch.nn.Parameter(torch.zeros(2, 2))
    name, _, _ = train_util.get_optimizer(args, trainable_params=[{"params": [p]}])
    expected = written[1].lower() if written else "adamw"
    assert name.rpartition(".")[2].lower() == expected


SCHEDULERS = [
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant",
]  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_multiplies(train_util, scheduler):
    parser = importlib.import_module("train_network").setup_parser()
    warmup = [] if scheduler in ("constant", "piecewise_constant") else ["--lr_warmup_steps", "2"]
    extra = {
        "cosine_with_min_lr": ["--lr_scheduler_min_lr_ratio", "0.1"],
        "warmup_stable_decay": ["--lr_decay_steps", "4", "--lr_scheduler_min_lr_ratio", "0.1"],
        "piecewise_constant": ["--lr_scheduler_args", "step_rules='1:3,0.5'"],
    }.get(scheduler, [])
    args = parser.parse_args(
        ["--optimizer_type", "Automagic_CameAMP", "--learning_rate", "1e-4", "--max_train_steps", "10",
         "--optimizer_args", "warmup_steps=0", "--lr_scheduler", scheduler, *warmup, *extra]
    )  # fmt: skip
    p = torch.nn.Parameter(torch.ones(3, 3))
    _, _, optimizer = train_util.get_optimizer(args, trainable_params=[{"params": [p], "lr": 2e-4}])
    schedule = train_util.get_scheduler_fix(args, optimizer, 1)
    for _ in range(6):
        p.grad = torch.randn(3, 3)
        optimizer.step()
        schedule.step()
    (rate,) = schedule.get_last_lr()
    mean, smallest, largest = optimizer.effective_learning_rates()[0]
    assert rate > 0
    assert (mean, smallest, largest) == pytest.approx((rate,) * 3, rel=1e-5)


# LoRA detection -----------------------------------------------------------------------------------------------------


def model_of(block_name, size=32):
    """A model with one block whose class has the name that a network module looks for."""
    block_class = type(block_name, (torch.nn.Module,), {})
    block = block_class()
    for layer in ("img_attn_proj", "img_mlp_0", "context_block_attn", "x_block_mlp"):
        setattr(block, layer, torch.nn.Linear(size, size))
    model = torch.nn.Module()
    model.double_blocks = torch.nn.ModuleList([block])
    return model


def _groups_of(network):
    try:
        return network.prepare_optimizer_params(None, 1e-4, 1e-4)
    except TypeError:
        return network.prepare_optimizer_params(None, 1e-4)


@pytest.mark.parametrize(
    ("module", "block", "options", "is_lora"),
    [
        ("networks.lora", "Transformer2DModel", {}, True),
        ("networks.lora_fa", "Transformer2DModel", {}, True),
        ("networks.dylora", "Transformer2DModel", {"unit": "2"}, True),
        ("networks.oft", "Transformer2DModel", {"enable_all_linear": "True"}, False),
        ("networks.lora_flux", "DoubleStreamBlock", {}, True),
        ("networks.oft_flux", "DoubleStreamBlock", {"enable_all_linear": "True"}, False),
        ("networks.lora_sd3", "SingleDiTBlock", {}, True),
        ("networks.lora_lumina", "JointTransformerBlock", {}, True),
        ("lycoris.kohya", "Transformer2DModel", {"algo": "lora"}, True),
        ("lycoris.kohya", "Transformer2DModel", {"algo": "loha"}, True),
        ("lycoris.kohya", "Transformer2DModel", {"algo": "lokr", "factor": "4"}, True),
        ("lycoris.kohya", "Transformer2DModel", {"algo": "full"}, False),
    ],
)
def test_lora_is_recognized_by_the_networks_own_names(train_util, module, block, options, is_lora, monkeypatch):
    network_module = pytest.importorskip(module) if module.startswith("lycoris") else importlib.import_module(module)
    unet = model_of(block)
    text_encoder = torch.nn.Module()
    text_encoders = [text_encoder, text_encoder] if re.search("sd3|flux|lumina", module) else text_encoder
    network = network_module.create_network(1.0, 4, 4.0, None, text_encoders, unet, neuron_dropout=None, **options)
    network.apply_to(text_encoders, unet, False, True)
    network.prepare_grad_etc(text_encoders, unet)
    parser = importlib.import_module("train_network").setup_parser()
    args = parser.parse_args(["--optimizer_type", "Automagic_CameAMP", "--learning_rate", "1e-4"])
    accelerator = train_util.prepare_accelerator(args)
    many = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
    groups = many(None, 1e-4, 1e-4) if many else _groups_of(network)
    groups = groups[0] if isinstance(groups, tuple) else groups
    _, _, optimizer = train_util.get_optimizer(args, groups)
    accelerator.prepare(network, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert parameters
    assert set(map(id, parameters)) <= set(map(id, names_of(optimizer._groups)))
    optimizer._parameters.locate(optimizer._groups)
    factors = optimizer._parameters.factors
    matrices = [p for p in parameters if p.ndim >= 2]
    assert factors == (set(matrices) if is_lora else set())


# Logs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", NETWORK_SCRIPTS + FULL_SCRIPTS)
def test_every_scripts_own_logging_shows_our_values(train_util, script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--optimizer_type", OWN_OPTIMIZERS[-1], "--logging_dir", str(tmp_path), "--learning_rate", "1e-4"]
    args = module.setup_parser().parse_args(argv)
    accelerator = train_util.prepare_accelerator(args)
    layer = torch.nn.Linear(64, 64)
    _, _, optimizer = train_util.get_optimizer(args, [{"params": layer.parameters(), "lr": 1e-4}])
    scheduler = train_util.get_scheduler_fix(args, optimizer, 1)
    layer, optimizer, scheduler = accelerator.prepare(layer, optimizer, scheduler)
    accelerator.init_trackers("test")
    loss = layer(torch.randn(2, 64)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    if script in NETWORK_SCRIPTS:
        import train_network

        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        (trainer_class,) = {kind for kind in kinds if issubclass(kind, train_network.NetworkTrainer)} - (
            {train_network.NetworkTrainer} if module is not train_network else set()
        )
        trainer = trainer_class()
        logs = trainer.generate_step_logs(args, loss.item(), loss.item(), scheduler, ["unet"])
        trainer.step_logging(accelerator, logs, 1, 1)
    else:
        logs = {"loss": loss.item()}
        train_util.append_lr_to_logs(logs, scheduler, args.optimizer_type)
        accelerator.log(logs, step=1)
    accelerator.end_training()
    scalars = read_scalars(tmp_path)
    ours_there = {"effective_lr/unet/mean", "effective_lr/unet/smallest", "effective_lr/unet/largest"}
    assert ours_there | {"context/multiplier", "context/consistency", "context/edge_cases"} <= set(scalars)
    assert scalars["effective_lr/unet/mean"][0][1] == pytest.approx(1e-6, rel=0.1)
    (history,) = [optimizer.optimizer.c_optim.loss_history]
    assert history == pytest.approx([loss.item()])


# Runs of the host's own loop ----------------------------------------------------------------------------------------


def many(folder, common, runs, **environment):
    """Several runs of the small models in one process."""
    file = folder / "runs.json"
    file.write_text(json.dumps([[*common, *more] for more in runs]), "utf-8")
    return run("--train_script", TINY, "--runs", str(file), **environment)


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(name, tmp_path, common):
    """Text encoder trained and not; the warm-up's end, and its half, before, on and after the break at 4 steps."""
    rank = ["--network_dim", "32"]  # Some factors are large enough for 8 bits.
    cases = [(text, warmup) for text in (False, True) for warmup in (2, 4, 6, 8, 12)]
    runs = []
    for text, warmup in cases:
        more = [*rank, *([] if text else ["--network_train_unet_only"])]
        options = [f"warmup_steps={warmup}", *(["momentum_scales=(1,2,3)"] if "COptim" in name else [])]
        here = tmp_path / f"{text}{warmup}"
        runs += [
            ours(here / "straight", name, 8, *more, "--save_state", options=options),
            ours(here / "half", name, 4, *more, "--save_state", options=options),
            ours(here / "resumed", name, 8, *more, "--save_state", "--resume", str(here / "half" / "a-state"),
                 "--skip_until_initial_step", "--first_batch", "4", options=options),
        ]  # fmt: skip
    many(tmp_path, common, runs)
    for text, warmup in cases:
        here = tmp_path / f"{text}{warmup}"
        straight, resumed = (load_file(str(here / kind / "a.safetensors")) for kind in ("straight", "resumed"))
        assert any("lora_te" in key for key in straight) == text
        assert straight.keys() == resumed.keys()
        for key, value in straight.items():
            assert torch.equal(value, resumed[key]), (text, warmup, key)
        states = [
            torch.load(here / kind / "a-state" / "optimizer.bin", weights_only=True)["state"]
            for kind in ("straight", "resumed")
        ]
        for key, state in states[0].items():
            for entry, value in state.items():
                other = states[1][key][entry]
                same = torch.equal(value, other) if torch.is_tensor(value) else value == other
                assert same, (text, warmup, key, entry)


# Options with which a script makes several optimizers, and how many.
SEVERAL = {
    "sdxl": (["--train_script", TINY_SDXL, "--fused_optimizer_groups", "3"], 3),
    "flux": (["--train_script", TINY_FLUX, "--blockwise_fused_optimizers"], 4),
}


@pytest.mark.parametrize("model", SEVERAL)
def test_several_optimizers_resume_bit_for_bit(model, tmp_path, common):
    """sd-scripts loads a state when it has prepared the first of them; the plugin loads the others."""
    words, count = SEVERAL[model]
    name = OWN_OPTIMIZERS[-1]
    schedule = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "7"]
    resume = ["--resume", str(tmp_path / "half" / "a-state"), "--first_batch", "4"]
    for kind, steps, more in (("straight", 8, []), ("half", 4, []), ("resumed", 4, resume)):
        run(*all_weights(common, tmp_path / kind, *words, *schedule, *more, name=name, steps=steps))
    straight, resumed = (load_file(str(tmp_path / kind / "a.safetensors")) for kind in ("straight", "resumed"))
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    for file in ("optimizer.bin", *(f"optimizer_{number}.bin" for number in range(1, count))):
        states = [torch.load(tmp_path / kind / "a-state" / file, weights_only=True) for kind in ("straight", "resumed")]
        assert {state["step"] for state in states[1]["state"].values()} == {8}, file
        for key, state in states[0]["state"].items():
            for entry, value in state.items():
                other = states[1]["state"][key][entry]
                assert torch.equal(value, other) if torch.is_tensor(value) else value == other, (file, key, entry)
        assert states[0]["param_groups"][0]["lr"] == states[1]["param_groups"][0]["lr"] == 1e-4


@pytest.mark.parametrize("script", [TINY_SDXL, TINY_FLUX], ids=["sdxl", "flux"])
@pytest.mark.parametrize("name", [OWN_OPTIMIZERS[0], OWN_OPTIMIZERS[-1]])
def test_steps_in_the_backward_pass_resume_bit_for_bit(name, script, tmp_path, common):
    words = ["--train_script", script, "--fused_backward_pass", "--logging_dir", str(tmp_path / "logs")]
    resume = ["--resume", str(tmp_path / "half" / "a-state"), "--first_batch", "4"]
    for kind, steps, more in (("straight", 8, []), ("half", 4, []), ("resumed", 4, resume)):
        done = run(*all_weights(common, tmp_path / kind, *words, *more, name=name, steps=steps))
        assert "ignores it" not in done.log
    straight, resumed = (load_file(str(tmp_path / kind / "a.safetensors")) for kind in ("straight", "resumed"))
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    files = [tmp_path / kind / "a-state" / "optimizer.bin" for kind in ("straight", "resumed")]
    states = [torch.load(file, weights_only=True) for file in files]
    assert {state["step"] for state in states[1]["state"].values()} == {8}
    for key, state in states[0]["state"].items():
        for entry, value in state.items():
            other = states[1]["state"][key][entry]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, (key, entry)
    first, second = (saved["param_groups"][0] for saved in states)
    assert torch.equal(first["gradient_magnitudes"], second["gradient_magnitudes"])
    if "COptim" in name:
        losses = first["c_optim_context"]["loss_history"]
        assert torch.allclose(losses, second["c_optim_context"]["loss_history"], rtol=0, atol=0, equal_nan=True)
        assert losses.isfinite().sum() == 8


def test_a_script_without_steps_in_the_backward_pass_says_so(tmp_path, common):
    done = run("--train_script", TINY, *common, *ours(tmp_path, "Automagic_CameAMP", 2, "--fused_backward_pass"))
    assert done.log.count("this script does not step in the backward pass, and ignores it") == 1


def test_several_optimizers_refuse_what_does_not_belong_to_them(tmp_path, common):
    run(*sdxl(common, tmp_path / "half"))
    folder = tmp_path / "half" / "a-state"
    resume = ["--resume", str(folder), "--first_batch", "4"]
    done = run(*sdxl(common, tmp_path / "b", *resume, groups=2), code=2)
    assert f"error: --resume {folder}: has also optimizer_2.bin" in done.stderr
    foreign = torch.load(folder / "optimizer_1.bin", weights_only=True)
    torch.save(foreign, folder / "optimizer_2.bin")
    done = run(*sdxl(common, tmp_path / "b", *resume), code=2)
    assert f"error: --resume {folder / 'optimizer_2.bin'}: parameter" in done.stderr
    (folder / "optimizer_2.bin").unlink()
    done = run(*sdxl(common, tmp_path / "b", *resume), code=2)
    assert f"error: --resume {folder}: has no optimizer_2.bin" in done.stderr
    assert not (tmp_path / "b" / "a.safetensors").exists()


def states_of(folder):
    saved = torch.load(folder / "a-state" / "optimizer.bin", weights_only=True)
    return saved["param_groups"], {state["step"] for state in saved["state"].values()}


def test_a_resumed_run_takes_the_new_rate_if_it_is_told_to(tmp_path, common):
    schedule = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "20", "--save_state"]
    run("--train_script", TINY, *common, *ours(tmp_path / "half", "Automagic_CameAMP", 4, *schedule))
    more = [*schedule, "--resume", tmp_path / "half" / "a-state", "--skip_until_initial_step"]
    new = ["--learning_rate", "2e-4", "--unet_lr", "4e-4"]
    told = {}
    for kind, option in (("old", []), ("new", ["--new_learning_rate_on_resume"])):
        words = [*option, *common, *ours(tmp_path / kind, "Automagic_CameAMP", 8, *more, *new)]
        told[kind] = "the state's learning rate, 0.0001, and not at" in run("--train_script", TINY, *words).log
    assert told == {"old": True, "new": False}
    for kind, rates in (("old", [1e-4, 1e-4]), ("new", [2e-4, 4e-4])):
        groups, steps = states_of(tmp_path / kind)
        assert steps == {8}
        assert [group["initial_lr"] for group in groups] == rates
        assert [group["lr"] for group in groups] == pytest.approx([rate * 8 / 20 for rate in rates])


def test_what_is_said_of_skipped_steps_is_so(tmp_path, common):
    """The host counts them once for each accumulated batch; with what the warning says instead it trains the rest."""
    options = ["--gradient_accumulation_steps", "2", "--save_state"]
    resume = [*options, "--resume", str(tmp_path / "half" / "a-state")]
    instead = ["--initial_step", "0"]
    done = many(tmp_path, common, [
        ours(tmp_path / "half", "Automagic_CameAMP", 4, *options),
        ours(tmp_path / "skipped", "Automagic_CameAMP", 8, *resume, "--skip_until_initial_step"),
        ours(tmp_path / "right", "Automagic_CameAMP", 4, *resume, *instead),
    ])  # fmt: skip
    assert done.log.count("count 2 times the steps already made") == 1
    assert states_of(tmp_path / "half")[1] == {4}
    assert max(states_of(tmp_path / "skipped")[1]) < 8
    assert states_of(tmp_path / "right")[1] == {8}


def test_the_hosts_options_work(tmp_path, common):
    """Each run is one process' worth of the host's loop; what is asserted is what the run left behind."""
    runs = {
        "loraplus": ["--network_args", "loraplus_lr_ratio=16"],
        "lrs": ["--unet_lr", "2e-4", "--text_encoder_lr", "5e-5", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"],
        "accumulation": ["--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5"],
        "norms": ["--scale_weight_norms", "1.0", "--network_train_unet_only"],
        "bf16": ["--full_bf16", "--mixed_precision", "bf16"],
        "text": ["--network_train_text_encoder_only"],
        "dropout": ["--network_args", "module_dropout=0.5", "rank_dropout=0.2"],
    }
    shared = [OWN_OPTIMIZERS[-1], 3, "--save_state", "--logging_dir"]
    many(tmp_path, common, [ours(tmp_path / key, *shared, f"{tmp_path / key}/logs", *runs[key]) for key in runs])
    for key in runs:
        assert load_file(str(tmp_path / key / "a.safetensors"))
        saved = torch.load(tmp_path / key / "a-state" / "optimizer.bin", weights_only=True)
        steps = {state["step"] for state in saved["state"].values()}
        assert steps <= {1, 2, 3} if key == "dropout" else steps == {3}, key
        scalars = read_scalars(tmp_path / key / "logs")
        shown = {name.split("/")[1] for name in scalars if name.startswith("effective_lr/")}
        text, unet = {"textencoder"}, {"unet"}
        plus = {f"{name} plus" for name in text | unet}
        assert shown == {"norms": unet, "text": text, "loraplus": text | unet | plus}.get(key, text | unet), key
        assert all(len(scalars[f"effective_lr/{name}/mean"]) >= 3 for name in shown)
        groups = saved["param_groups"]
        rates = {round(group["initial_lr"], 8) for group in groups}
        if key == "loraplus":
            assert rates == {1e-4, 1.6e-3}
            assert {group["max_lr"] for group in groups} == {1e-3, 1.6e-3}
        if key == "lrs":
            assert rates == {2e-4, 5e-5}


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_two_processes_keep_the_same_weights(name, tmp_path, common):
    done = run(
        "--train_script", TINY, *common, *ours(tmp_path, name, 6, options=["warmup_steps=4"]),
        program=["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    )  # fmt: skip
    ends = dict(re.findall(r"rank (\d) ends with (\w+)", done.stdout))
    assert set(ends) == {"0", "1"}
    assert ends["0"] == ends["1"]


def test_spawned_workers_load_the_data(tmp_path, common):
    words = ours(tmp_path, steps=2, options=["warmup_steps=2"])
    done = run("--train_script", TINY, *common, *words, "--max_data_loader_n_workers", "2", "--spawn_workers")
    assert "rank 0 ends with" in done.stdout
    assert "workers were spawned" in done.stdout


def test_an_unpatched_host_takes_the_copied_files(tmp_path, common):
    """The files are linked into a copy of the host that shares everything else with it."""
    host = tmp_path / "host"
    host.mkdir()
    for item in Path(SD_SCRIPTS).resolve().iterdir():
        if item.name != "library":
            (host / item.name).symlink_to(item)
    (host / "library").mkdir()
    for item in [*(Path(SD_SCRIPTS).resolve() / "library").iterdir(), ROOT / "library" / "automagic_cameamp.py",
                 ROOT / "library" / "cameamp"]:  # fmt: skip
        (host / "library" / item.name).symlink_to(item)
    (host / "tiny_network.py").write_text(Path(TINY).read_text("utf-8"), "utf-8")
    # Several numbers without brackets and blanks are several numbers to the host too.
    options = ["warmup_steps=2", "betas=0.7,0.99,0.999"]
    words = ours(tmp_path / "o", "library.automagic_cameamp.Automagic_CameAMP", 2, options=options)
    start("tiny_network.py", *common, *words, folder=host)
    with safe_open(str(tmp_path / "o" / "a.safetensors"), "pt") as file:
        name = "library.automagic_cameamp.Automagic_CameAMP(warmup_steps=2,betas=(0.7, 0.99, 0.999))"
        assert file.metadata()["ss_optimizer"] == name


# Whole scripts, with a full-size model --------------------------------------------------------------------------------


@needs_sd15
def test_a_lora_of_sd15_under_accelerate_launch(tmp_path):
    network = ["--network_module", "networks.lora", "--network_dim", "4", "--network_train_unet_only"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    resume = ("--resume", str(tmp_path / "a-state"), "--skip_until_initial_step")
    for steps, more in ((3, ()), (5, resume)):
        run(
            "--train_data_dir", f"{SD15}/data", *sd15_arguments(tmp_path), *network, "--max_train_steps", str(steps),
            "--optimizer_type", OWN_OPTIMIZERS[-1], "--optimizer_args", "warmup_steps=2", *more, program=launch,
        )  # fmt: skip
    saved = torch.load(tmp_path / "a-state" / "optimizer.bin", weights_only=True)
    assert {state["step"] for state in saved["state"].values()} == {5}
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        assert file.metadata()["ss_optimizer"].startswith(f"library.automagic_cameamp.{OWN_OPTIMIZERS[-1]}(")


@needs_sd15
def test_all_of_sd15_with_8bit_states(tmp_path):
    metadata = {str(path): {"caption": "a cat"} for path in sorted(Path(SD15, "data").rglob("*.png"))}
    (tmp_path / "images.json").write_text(json.dumps(metadata), "utf-8")
    done = run(
        "--train_script", "fine_tune.py", "--train_data_dir", f"{SD15}/data",
        "--in_json", str(tmp_path / "images.json"),
        *(word for word in sd15_arguments(tmp_path) if word != "--save_state"), "--max_train_steps", "2",
        "--optimizer_type", "Automagic_CameAMP8bit", "--optimizer_args", "warmup_steps=1",
    )  # fmt: skip
    assert "none of 686 parameters is a LoRA factor" in done.log
    assert len(read_scalars(tmp_path / "logs")["effective_lr/unet/mean"]) == 2

"""The plugin, against a stand-in for sd-scripts: finding it, joining the packages, options, the loop, logs."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import started
import toml
import torch
from logs import read_scalars

from library.automagic_cameamp import Automagic_CameAMP, OptimizerConfig
from library.cameamp.command_line import UserError, misspelt_name
from library.cameamp.sd_scripts.checkout import find_sd_scripts, find_training_script
from library.cameamp.sd_scripts.monitor import Monitor
from library.cameamp.sd_scripts.plugin import Plugin
from library.cameamp.sd_scripts.settings import as_toml, resolve

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT / "tests" / "stand_in"
SCRIPT = str(ROOT / "train_network_patch.py")


def run(*arguments, folder=None, program=(sys.executable, SCRIPT), **environment):
    """Run the command line as users do."""
    variables = {**os.environ, "SD_SCRIPTS_DIR": str(STAND_IN), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    variables |= environment
    return started.run([*map(str, program), *arguments], folder or ROOT, variables)


def host_args(**changed):
    """sd-scripts' options, as far as they concern an optimizer."""
    defaults = {
        "optimizer_type": "Automagic_CameAMP", "optimizer_args": None, "learning_rate": 1e-4,
        "lr_scheduler": "constant", "network_module": "networks.lora", "gradient_accumulation_steps": 1, "resume": None,
    }  # fmt: skip
    return Namespace(**{**defaults, **changed})


# Finding it ---------------------------------------------------------------------------------------------------------


def test_the_first_place_that_holds_a_checkout_is_taken(tmp_path):
    beside = tmp_path / "sd-scripts"
    shutil.copytree(STAND_IN, beside)
    inner = tmp_path / "work"
    shutil.copytree(STAND_IN, inner / "sd-scripts")
    assert find_sd_scripts(None, {}, inner) == inner / "sd-scripts"
    shutil.rmtree(inner / "sd-scripts")
    assert find_sd_scripts(None, {}, inner) == beside
    assert find_sd_scripts(None, {}, beside) == beside
    assert find_sd_scripts(None, {"SD_SCRIPTS_DIR": str(STAND_IN)}, inner) == STAND_IN
    assert find_sd_scripts(str(beside), {"SD_SCRIPTS_DIR": str(STAND_IN)}, inner) == beside


def test_a_missing_checkout_is_told_with_the_places_tried(tmp_path):
    (tmp_path / "sd-scripts").mkdir()
    with pytest.raises(UserError) as caught:
        find_sd_scripts(None, {}, tmp_path)
    text = str(caught.value)
    assert f"./sd-scripts, {tmp_path / 'sd-scripts'}: no library/train_util.py and no train_network.py" in text
    assert f"../sd-scripts, {tmp_path.parent / 'sd-scripts'}: not a folder" in text
    # What the user named is not silently replaced by another one.
    with pytest.raises(UserError, match=r"--sd_scripts, .*nowhere: not a folder"):
        find_sd_scripts("nowhere", {"SD_SCRIPTS_DIR": str(STAND_IN)}, tmp_path)
    with pytest.raises(UserError, match=r"SD_SCRIPTS_DIR, .*nowhere: not a folder"):
        find_sd_scripts(None, {"SD_SCRIPTS_DIR": "nowhere"}, tmp_path)


def test_a_missing_script_is_told_with_those_there_are(tmp_path):
    assert find_training_script(STAND_IN, "fine_tune.py") == STAND_IN / "fine_tune.py"
    with pytest.raises(UserError, match=r"'sdxl\.py'.* it has train_network\.py"):
        find_training_script(STAND_IN, "sdxl.py")
    with pytest.raises(UserError, match=r"'trainnetwork\.py'.* did you mean 'train_network\.py'\?$"):
        find_training_script(STAND_IN, "trainnetwork.py")


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written", ["Automagic_CameAMP8bit", "automagic_CAMEAMP8BIT", "library.automagic_cameamp.Automagic_CameAMP8bit"]
)
def test_names_in_any_case_become_the_path_that_the_host_imports(written):
    args = host_args(optimizer_type=written)
    resolve(args)
    assert args.optimizer_type == "library.automagic_cameamp.Automagic_CameAMP8bit"
    assert args.optimizer_args == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Automagic-CameAMP8bit", "Automagic_CameAMP8bit"),
        ("Automagic_CameAMP8bit ", "Automagic_CameAMP8bit"),
        ("Automagic CameAMP COptim", "Automagic_CameAMP_COptim"),
        ("Automagic_CamAMP", "Automagic_CameAMP"),
        ("automagiccameamp_coptim_8bit", "Automagic_CameAMP_COptim8bit"),
        ("CameAMP", "Automagic_CameAMP"),
        ("Automagic", "Automagic_CameAMP"),
        ("automagic_cameamp.Automagic_CameAMP8bits", "automagic_cameamp.Automagic_CameAMP8bit"),
        ("library.automagic_cameapm.Automagic_CameAMP", "library.automagic_cameamp.Automagic_CameAMP"),
    ],
)
def test_a_misspelt_name_is_told_with_the_nearest(written, meant):
    with pytest.raises(UserError) as caught:
        resolve(host_args(optimizer_type=written))
    assert str(caught.value) == f"--optimizer_type is {written!r}, did you mean {meant!r}?"


def test_a_misspelt_name_ends_a_run_before_the_model_is_loaded():
    done = run("--optimizer_type", "Automagic-CameAMP8bit", "--network_module", "x")
    assert (done.returncode, "loading the model" in done.stdout) == (2, False)


def test_names_of_others_are_no_misspelt_ones_of_ours():
    names = [name for name in vars(torch.optim) if name[0].isupper()]
    names += ["AdamW8bit", "PagedAdamW32bit", "DAdaptAdanIP", "AdamWScheduleFree", "SGDNesterov8bit", "CAME", "Prodigy"]
    assert [name for name in names if misspelt_name(name) is not None] == []


@pytest.mark.parametrize(
    "written", ["AdamW", "Adafactor", "", None, "other.Automagic_CameAMP", "toml.Automagic_CameAMP"]
)
def test_other_optimizers_are_left_alone(written):
    args = host_args(optimizer_type=written, lr_scheduler="adafactor", optimizer_args=["nonsense"])
    before = dict(vars(args))
    assert resolve(args) is None
    assert vars(args) == before


def test_the_command_line_wins_over_the_table_and_the_rest_is_passed_on():
    args = host_args(optimizer_args=["warmup_steps=7", "betas=(0.9, 0.99, 0.999)"])
    config = resolve(args, {"warmup_steps": 3, "lr_bump": 1e-5}, "run.toml")
    assert config == OptimizerConfig(lr=1e-4, warmup_steps=7, lr_bump=1e-5, betas=(0.9, 0.99, 0.999))
    assert args.optimizer_args == ["warmup_steps=7", "lr_bump=1e-05", "betas=(0.9, 0.99, 0.999)"]
    again = dict(vars(args))
    assert resolve(args) == config
    assert vars(args) == again


def test_full_finetuning_is_known_from_the_script_and_can_be_overruled():
    args = host_args()
    del args.network_module
    assert resolve(args).full_finetune
    assert args.optimizer_args == ["full_finetune=True"]
    args.optimizer_args = ["full_finetune=False"]
    assert not resolve(args).full_finetune
    assert not resolve(host_args()).full_finetune


@pytest.mark.parametrize(
    ("changed", "table", "message"),
    [
        ({}, {"lr_bumb": 1e-6}, r"run\.toml: \[optimizer_config\]: unknown option 'lr_bumb', did you mean 'lr_bump'"),
        ({}, {"came": "yes"}, r"run\.toml: \[optimizer_config\]: option 'came' is 'yes'; allowed: True or False"),
        ({}, {"lr": 1e-4}, r"\[optimizer_config\]: has the key 'lr'"),
        ({}, 5, r"\[optimizer_config\] is 5; allowed: a table"),
        ({"optimizer_args": ["eta"]}, None, "'eta' has no '='"),
        ({"optimizer_args": ["eta=two"]}, None, "value of 'eta' is 'two'"),
        ({"optimizer_args": "eta=2"}, None, r'optimizer_args is "eta=2"; allowed: a list, \["eta=2"\]'),
        ({"learning_rate": 1.0}, None, r"^learning_rate is 1\.0; allowed: a number from min_lr"),
        ({"learning_rate": "1e-6"}, None, "^learning_rate is '1e-6'; allowed: a finite number"),
        ({"learning_rate": 0}, None, r"^learning_rate is 0\.0; allowed: a number from min_lr"),
        ({"learning_rate": 0, "unet_lr": 0.0}, None, r"^learning_rate is 0\.0; allowed: a number from min_lr"),
        (
            {"unet_lr": 1.0},
            None,
            r"^unet_lr is 1\.0; allowed: 0 or a number from min_lr \(1e-07\) to max_lr \(0\.001\)$",
        ),
        ({"text_encoder_lr": [1e-4, 1]}, None, "^text_encoder_lr is 1; allowed"),
        ({"text_encoder_lr": 1.0}, None, r"^text_encoder_lr is 1\.0; allowed"),
        ({"unet_lr": "1e-4"}, None, "^unet_lr is '1e-4'; allowed"),
        ({"unet_lr": True}, None, "^unet_lr is True; allowed"),
        ({"unet_lr": float("nan")}, None, "^unet_lr is nan; allowed"),
        ({"unet_lr": 1e-3}, {"max_lr": 5e-4}, r"^unet_lr is 0\.001; allowed: .* to max_lr \(0\.0005\)"),
        ({"learning_rate_te2": 1.0}, None, r"^learning_rate_te2 is 1\.0; allowed"),
        ({"block_lr": "1e-4,0,1"}, None, r"^block_lr is 1\.0; allowed"),
        ({"block_lr": "1e-4,x"}, None, "^block_lr is 'x'; allowed"),
        ({"mod_lr": 1e-9}, None, "^mod_lr is 1e-09; allowed"),
        ({"optimizer_args": ["eta=1", "eta=2"]}, None, "'eta' stands there twice"),
        (
            {"optimizer_args": ["betas=(0.8,", "0.99,", "0.999)"]},
            None,
            r"cut off at a blank; .*betas=0\.8,0\.99,0\.999",
        ),
        ({"lr_scheduler": "adafactor"}, None, "--lr_scheduler adafactor works with the optimizer Adafactor only"),
        ({"deepspeed": True}, None, "--deepspeed flattens parameters"),
        (
            {"fused_backward_pass": True, "gradient_accumulation_steps": 2},
            None,
            "--gradient_accumulation_steps 2 adds gradients up",
        ),
        ({"fused_backward_pass": True, "mixed_precision": "fp16"}, None, "train in bf16"),
        ({"fused_backward_pass": True, "full_fp16": True}, None, "train in bf16"),
    ],
)
def test_mistakes_are_told(changed, table, message):
    with pytest.raises(UserError, match=message):
        resolve(host_args(**changed), table, "run.toml")


@pytest.mark.parametrize(
    "changed",
    [
        {"unet_lr": 1e-3, "text_encoder_lr": 0},
        {"learning_rate": 0, "unet_lr": 1e-4},
        {"learning_rate": 0.0, "text_encoder_lr": [0, 1e-4]},
        {"text_encoder_lr": []},
        {"block_lr": "0,1e-4"},
        {"block_lr": ""},
        {"network_args": ["loraplus_lr_ratio=16"], "unet_lr": 1e-3},
    ],
    ids=str,
)
def test_rates_of_0_and_within_the_bounds_are_taken(changed):
    assert resolve(host_args(**changed)) is not None


def test_a_learning_rate_of_0_freezes_what_has_no_rate_of_its_own():
    train_util = SimpleNamespace(
        read_config_from_file=None, prepare_accelerator=None,
        get_optimizer=lambda args, groups: ("", "", Automagic_CameAMP(groups, lr=args.learning_rate)),
    )  # fmt: skip
    Plugin().install(train_util)
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))]},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1e-4},
    ]
    args = host_args(learning_rate=0.0, unet_lr=1e-4)
    _, _, optimizer = train_util.get_optimizer(args, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 1e-4]
    assert args.learning_rate == 0
    assert "learning_rate = 0.0 " in as_toml(resolve(args), args.learning_rate)


def test_nothing_to_train_says_what_the_rates_are():
    train_util = SimpleNamespace(read_config_from_file=None, prepare_accelerator=None, get_optimizer=None)
    Plugin().install(train_util)
    with pytest.raises(UserError, match=r"^there is nothing to train: learning_rate is 0\.0001, unet_lr is 0\.0; what"):
        train_util.get_optimizer(host_args(unet_lr=0.0), [])


@pytest.mark.parametrize(
    "words",
    [["betas=0.8,0.99,0.999", "momentum_scales=1,5"], ["betas=(0.8,0.99,0.999)", "momentum_scales=[1,5]"]],
)
def test_several_numbers_need_neither_brackets_nor_blanks(words):
    args = host_args(optimizer_args=words)
    assert resolve(args) == OptimizerConfig(lr=1e-4, betas=(0.8, 0.99, 0.999), momentum_scales=(1, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[optimizer_config]\neta = 1.0\nmax_train_steps = 7\n",
            "'max_train_steps' is an option of the trainer; write it above",
        ),
        (
            "[a]\nmax_train_steps = 1\n[b]\nmax_train_steps = 2\n",
            "'max_train_steps' stands in [a] and in [b]; keep one",
        ),
        ("resume = ''\n[b]\nresume = ''\n", "'resume' stands in the file's beginning and in [b]; keep one"),
        (
            "optimizer_args = ['eta=1.0']\n[optimizer_config]\neta = 2.0\n",
            "'eta' stands in [optimizer_config] and in optimizer_args",
        ),
        ("[a]\nunet_lr = '1e-4'\n", "unet_lr is '1e-4'; allowed: 0 or a number"),
        ("warmup_steps = 7\n", "'warmup_steps' does nothing outside of"),
        ("[optimizer]\neta = 1.0\n", "'eta' does nothing outside of"),
        ("[optimizer_args]\neta = 1.0\n", "[optimizer_args] does nothing; the optimizer's options stand in"),
        ("[optimiser_config]\neta = 1.0\n", "[optimiser_config] does nothing"),
        ("[optimizer_config]\nmomentum_scales = (1, 5)\n", "square brackets: [1, 5]"),
    ],
)
def test_options_that_the_host_would_drop_are_told(text, message, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('optimizer_type = "Automagic_CameAMP"\n' + text, "utf-8")
    done = run("--config_file", str(path), "--print_optimizer_config")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(("error: unet_lr", f"error: {path}"))
    assert message in done.stderr


def test_options_of_other_optimizers_are_nothing_that_we_know(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('optimizer_type = "AdamW"\nwarmup_steps = 7\nmax_train_steps = 1\n', "utf-8")
    assert run("--config_file", str(path)).returncode == 0


def test_a_mark_before_the_file_would_cost_the_host_its_first_key(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('optimizer_type = "Automagic_CameAMP"\n', "utf-8-sig")
    done = run("--config_file", str(path))
    assert (done.returncode, done.stderr.splitlines()[-1][:6]) == (2, "error:")
    assert "save it as UTF-8 without BOM" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_file_of_another_encoding_is_told(encoding, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(
        'optimizer_type = "Automagic_CameAMP"\n{}'.format("# \u00fc" * (encoding != "utf-16-le")).encode(encoding)
    )
    done = run("--config_file", str(path))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, f"error: {path}: is not encoded as UTF-8; save it as UTF-8"
    )  # fmt: skip


def test_the_command_line_wins_over_the_arguments_of_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('optimizer_type = "Automagic_CameAMP"\n[optimizer_config]\neta = 2.0\n', "utf-8")
    done = run("--config_file", str(path), "--optimizer_args", "eta=3.0", "--print_optimizer_config")
    assert (done.returncode, "eta = 3.0" in done.stdout) == (0, True), done.stderr


def test_a_script_that_was_copied_elsewhere_says_so(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(STAND_IN / "library", tmp_path / "library")
    done = run("--embedded", program=(sys.executable, str(tmp_path / "train_network_patch.py")))
    assert done.returncode == 2
    assert "in the folder of its project" in done.stderr


def test_8bit_without_bitsandbytes_is_told_before_the_host_tries(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"pip install 'bitsandbytes>=0\.43'"):
        resolve(host_args(optimizer_type="Automagic_CameAMP8bit"))


def test_the_printed_configuration_gives_the_same_one_again():
    config = OptimizerConfig(lr=2e-4, warmup_steps=9, betas=(0.7, 0.98, 0.99), came=False)
    document = toml.loads(as_toml(config, 2e-4))
    args = host_args(learning_rate=document["learning_rate"])
    assert resolve(args, document["optimizer_config"]) == config


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with spawned workers, accumulation and trackers."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.toml").write_text(
        'optimizer_type = "AUTOMAGIC_cameamp_COPTIM"\nlearning_rate = 1e-4\n[optimizer_config]\nwarmup_steps = 3\n',
        "utf-8",
    )
    done = run(
        "--config_file", str(folder / "run"), "--network_module", "x", "--logging_dir", str(folder / "logs"),
        "--gradient_accumulation_steps", "2", "--max_data_loader_n_workers", "2", "--output_dir", str(folder / "state"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_goes_through_the_hosts_own_script(finished):
    _, done = finished
    assert "ss_optimizer library.automagic_cameamp.Automagic_CameAMP_COptim(warmup_steps=3)" in done.stdout
    assert "2 of 2 parameters are LoRA factors" in done.stderr


def test_both_packages_can_be_imported_in_spawned_workers(finished):
    _, done = finished
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("imported")]
    assert {(line[1], line[2]) for line in lines} == {
        (str(ROOT / "library" / "automagic_cameamp.py"), str(STAND_IN / "library" / "train_util.py"))
    }
    assert len({line[3] for line in lines}) == 2


def test_trackers_receive_the_effective_learning_rates_of_every_group(finished):
    folder, done = finished
    scalars = read_scalars(folder / "logs")
    for group in ("unet", "unet plus"):  # as the host calls them
        mean, low, high = (dict(scalars[f"effective_lr/{group}/{what}"]) for what in ("mean", "smallest", "largest"))
        assert set(mean) == {0, 1, 2, 3, 4}
        assert all(low[step] <= mean[step] <= high[step] for step in mean)
    # The scheduler's own value says nothing of the mask and the row scaling.
    assert len({round(value, 9) for _, value in scalars["effective_lr/unet/mean"]}) > 2
    assert not any("group" in name for name in scalars if name.startswith("effective_lr"))
    # The bar shows the same rates, those of the step whose losses it shows.
    last = {group: scalars[f"effective_lr/{group}/mean"][-1][1] for group in ("unet", "unet plus")}
    assert ", ".join(f"lr/{group}={rate:.2e}" for group, rate in last.items()) in done.stderr


def test_trackers_receive_what_drives_a_contextual_optimizer(finished):
    folder, _ = finished
    scalars = read_scalars(folder / "logs")
    multiplier = dict(scalars["context/multiplier"])
    assert multiplier[0] == pytest.approx(1e-6 / 2e-4)  # where it starts, for the larger of two learning rates
    assert len(set(multiplier.values())) > 2
    assert {"context/consistency", "context/edge_cases", "context/alignment"} <= set(scalars)


def test_the_loss_reaches_the_optimizer_undivided_and_averaged_over_accumulation(finished):
    folder, _ = finished
    losses = [value for _, value in read_scalars(folder / "logs")["loss"]]
    pairs = [(first + second) / 2 for first, second in zip(losses[::2], losses[1::2])]
    saved = torch.load(folder / "state" / "optimizer.bin", weights_only=True)
    history = saved["param_groups"][0]["c_optim_context"]["loss_history"]
    assert history[~history.isnan()].tolist() == pytest.approx(pairs, rel=1e-5)


def test_the_state_is_saved_by_accelerate_and_resumed(finished):
    folder, _ = finished
    saved = torch.load(folder / "state" / "optimizer.bin", weights_only=True)
    assert [saved["state"][key]["step"] for key in (0, 1)] == [4, 4]
    done = run(
        "--optimizer_type", "Automagic_CameAMP_COptim", "--learning_rate", "1e-4",
        "--optimizer_args", "warmup_steps=3", "--network_module", "x", "--resume", str(folder / "state"),
        "--output_dir", str(folder / "again"), "--max_train_steps", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = torch.load(folder / "again" / "optimizer.bin", weights_only=True)
    assert [again["state"][key]["step"] for key in (0, 1)] == [6, 6]


def test_other_optimizers_train_on():
    done = run("--max_train_steps", "2", "--network_module", "x")
    assert done.returncode == 0, done.stderr
    assert "ss_optimizer torch.optim.adamw.AdamW()" in done.stdout
    assert "lr=" not in done.stderr


def test_full_finetuning_with_an_optimizer_a_layer(tmp_path):
    done = run(
        "--train_script", "fine_tune.py", "--optimizer_type", "Automagic_CameAMP_COptim",
        "--logging_dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("full_finetune")]
    assert lines == [
        "full_finetune True names ['0.bias', '0.weight']",
        "full_finetune True names ['1.bias', '1.weight']",
    ]
    # Each optimizer knew the loss before its first parameter's gradient was there.
    assert "losses [4, 4]" in done.stdout
    names = {"effective_lr/group0/mean", "effective_lr/group1/mean", "context0/multiplier", "context1/multiplier"}
    assert names <= set(read_scalars(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "code", "out", "error"),
    [
        (("--print_optimizer_config", "--optimizer_type", "Automagic_CameAMP"), 0, "warmup_steps = 500", ""),
        (("--print_optimizer_config",), 2, "", "the optimizer is AdamW"),
        (("--optimizer_type", "Automagic_CameAMP", "--optimizer_args", "etta=3"), 2, "", "did you mean 'eta'?"),
        (("--train_script", "nothing.py"), 2, "", "--train_script is 'nothing.py'"),
        (("--config_file", "nothing"), 2, "", "nothing.toml: cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_end_a_run_before_the_model_is_loaded(arguments, code, out, error):
    done = run(*arguments, "--network_module", "x") if "--train_script" not in arguments else run(*arguments)
    assert (done.returncode, "loading the model" in done.stdout) == (code, False), done.stderr
    assert out in done.stdout
    assert error in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 0),
        (("--print_optimizer_config",), 0),
        (("--optimizer_args", "etta=3"), 2),
    ],
    ids=str,
)
def test_nothing_of_ours_shows_the_tokens_that_the_host_was_given(arguments, code, tmp_path):
    secrets = {"huggingface_token": "hf_secretsecret", "wandb_api_key": "keysecretsecret"}
    config = tmp_path / "run.toml"
    lines = ['optimizer_type = "Automagic_CameAMP_COptim"', f"huggingface_token = '{secrets['huggingface_token']}'"]
    config.write_text("\n".join(lines) + "\n[optimizer_config]\nverbose = true\n", "utf-8")
    done = run(
        "--config_file", str(config), "--wandb_api_key", secrets["wandb_api_key"], "--network_module", "x",
        "--logging_dir", str(tmp_path / "logs"), "--output_dir", str(tmp_path / "state"), *arguments,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    assert (len(files) > 3) == (arguments == ())
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in path.read_bytes() for path in files)


def test_files_copied_into_the_host_need_nothing_else_of_ours(tmp_path):
    host = tmp_path / "host"
    shutil.copytree(STAND_IN, host)
    shutil.copy(ROOT / "library" / "automagic_cameamp.py", host / "library")
    shutil.copytree(ROOT / "library" / "cameamp", host / "library" / "cameamp")
    done = run(
        "--optimizer_type", "library.automagic_cameamp.Automagic_CameAMP",
        "--optimizer_args", "warmup_steps=2", "fused=False",  # kernels would be compiled anew
        program=(sys.executable, "train_network.py"), folder=host,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"imported {host / 'library' / 'automagic_cameamp.py'}" in done.stdout
    assert "Automagic_CameAMP(warmup_steps=2,fused=False)" in done.stdout


# Reading no more than is shown --------------------------------------------------------------------------------------


class Bar:
    """A progress bar that keeps what it is told."""

    disable = False

    def set_postfix(self, **values):
        self.shown = values


class Tracker:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.logged = []

    def log(self, values, step=None):
        self.logged.append(values)


@pytest.fixture
def monitored(monkeypatch):
    """A monitor of an optimizer, and the list that each of its readings adds to."""
    readings = []
    from library.cameamp.sd_scripts import monitor as module

    read = module.read
    monkeypatch.setattr(module, "read", lambda optimizers: readings.append(1) or read(optimizers))
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Automagic_CameAMP([p])
    p.grad = torch.randn(4, 4)
    optimizer.step()
    return Monitor([optimizer]), readings


def test_one_reading_serves_all_who_show_a_step(monitored):
    monitor, readings = monitored
    trackers = [Tracker(), Tracker()]
    for tracker in trackers:
        monitor.add_to_tracker(tracker)
    monitor.step_ends()
    for tracker in trackers:
        tracker.log({"lr/unet": 1.0}, step=1)
        tracker.log({"loss/epoch": 1.0}, step=1)
    assert [sorted(values)[0] for values in trackers[0].logged] == ["effective_lr/group0/largest", "loss/epoch"]
    assert len(readings) == 1
    monitor.step_ends()
    assert len(readings) == 1


def test_the_bar_alone_reads_every_tenth_step(monitored, monkeypatch):
    monitor, readings = monitored
    bar_class = type("HostBar", (Bar,), {})
    monitor.add_to_progress_bars(bar_class)
    bar = bar_class()
    for _ in range(20):
        monitor.step_ends()
        bar.set_postfix(avr_loss=0.5)
        assert bar.shown["lr"] == "1.00e-06"
    assert len(readings) == 2
    bar.set_postfix(val_avg_loss=0.5)
    assert bar.shown == {"val_avg_loss": 0.5}
    bar.disable = True
    monitor.step_ends()
    bar.set_postfix(avr_loss=0.5)
    assert bar.shown == {"avr_loss": 0.5}
    assert len(readings) == 2


@pytest.mark.parametrize(
    ("logged", "names"),
    [
        ({"lr/textencoder": 1e-4, "lr/unet": 2e-4, "lr/group1": 2e-4}, ["textencoder", "unet"]),
        ({"lr/unet": 1e-4, "lr/d*lr/unet": 1.0, "lr/unet plus": 2e-4}, ["unet", "unet plus"]),
        # Two groups of one name leave one value of two.
        ({"lr/unet": 1e-4, "lr/textencoder": 2e-4}, ["group0", "group1"]),
        ({"lr/unet": 1e-4}, ["group0", "group1"]),
        ({"lr/unet": 3e-4, "lr/unet plus": 4e-4}, ["group0", "group1"]),
    ],
    ids=str,
)
def test_groups_have_the_names_under_which_the_host_logs_their_rates(logged, names):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1e-4, 2e-4)]
    monitor, tracker = Monitor([Automagic_CameAMP(groups)]), Tracker()
    monitor.add_to_tracker(tracker)
    tracker.log(logged)
    (values,) = tracker.logged
    assert [name.split("/")[1] for name in values if name.startswith("effective_lr") and "mean" in name] == names


def test_with_a_tracker_the_bar_shows_the_step_that_it_logs(monitored):
    monitor, readings = monitored
    bar_class = type("HostBar", (Bar,), {})
    monitor.add_to_progress_bars(bar_class)
    monitor.add_to_tracker(Tracker())
    bar = bar_class()
    for number in range(3):
        monitor.step_ends()
        bar.set_postfix(avr_loss=0.5)
        assert len(readings) == number + 1

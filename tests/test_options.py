"""The embedded trainer's options: the file, the command line, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.cameamp.command_line import UserError, optimizer_name
from library.cameamp_demo.options import Options, is_embedded, parse

ROOT = Path(__file__).resolve().parent.parent


def written(folder, text):
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_shipped_file():
    run = parse(["--config_file", str(ROOT / "configs" / "embedded_lora.toml")])
    assert run.options.max_train_steps == 600
    assert run.options.save_state is True
    assert run.optimizer_config.warmup_steps == 75
    assert run.optimizer_config.lr == run.options.learning_rate


def test_defaults():
    run = parse([])
    assert run.options == Options()
    assert run.optimizer_config.lr == 1e-6


def test_command_line_wins_over_the_file(tmp_path):
    path = written(
        tmp_path,
        'learning_rate = 1e-4\nseed = 1\n[t]\noutput_name = "a"\n[optimizer_config]\neta = 1.0\nlr_bump = 1e-6\n',
    )
    run = parse(["--config_file", path, "--learning_rate", "2e-4", "--optimizer_args", "eta=3.0", "--save_state"])
    assert (run.options.learning_rate, run.options.seed, run.options.output_name) == (2e-4, 1, "a")
    assert (run.optimizer_config.eta, run.optimizer_config.lr_bump, run.optimizer_config.lr) == (3.0, 1e-6, 2e-4)
    assert run.options.save_state is True


def test_tables_and_types_of_toml(tmp_path):
    text = (
        "learning_rate = 1e-4\n[optimizer_config]\nbetas = [0.9, 0.99, 0.999]\nmomentum_scales = [1, 4]\ncame = false\n"
    )
    config = parse(["--config_file", written(tmp_path, text)]).optimizer_config
    assert (config.betas, config.momentum_scales, config.came) == ((0.9, 0.99, 0.999), (1, 4), False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optimizer_config]\nwarmup_step = 3\n", ["run.toml", "warmup_step", "'warmup_steps'"]),
        ("[optimizer_config]\nwarmup_steps = 3.5\n", ["run.toml", "warmup_steps", "3.5", "whole number"]),
        ("[optimizer_config]\nlr = 1e-4\n", ["run.toml", "'lr'", "learning_rate"]),
        ("[optimizer_config]\neta = 1.0\nbetas = [0.8, 1, 0.999]\n", ["run.toml", "line 3", "'betas'", "1.0"]),
        ("[optimizer_config]\nbetas = [0.8, 1.5, 0.999]\n", ["run.toml", "betas", "1.5"]),
        ("optimizer_config = 3\n", ["run.toml", "optimizer_config", "table"]),
        ("max_train_step = 3\n", ["run.toml", "max_train_step", "'max_train_steps'"]),
        ("max_train_steps = 3.5\n", ["run.toml", "max_train_steps", "3.5", "whole number"]),
        ("max_train_steps = true\n", ["run.toml", "max_train_steps", "True"]),
        ('seed = "a"\n', ["run.toml", "seed", "'a'"]),
        ("max_train_steps = 0\n", ["max_train_steps", "at least 1"]),
        ("network_alpha = 0\n", ["network_alpha"]),
        ("network_alpha = nan\n", ["network_alpha", "finite"]),
        ('optimizer_type = "AdamW"\nlearning_rate = inf\n', ["learning_rate", "finite"]),
        ("seed = 4294967296\n", ["seed", "below 4294967296"]),
        ("seed = 1\n[seed.more]\na = 1\n", ["run.toml", "not valid TOML"]),
        ('mixed_precision = "fp8"\n', ["mixed_precision", "no, bf16"]),
        ('output_name = "../x"\n', ["output_name", "without a folder"]),
        ('resume = "nowhere"\n', ["resume", "nowhere"]),
        ("optimizer_args = [3]\n", ["optimizer_args", "list of texts"]),
        ("learning_rate = 1.0\n", ["lr", "1.0", "max_lr"]),
        ('optimizer_type = "AdamW"\n[optimizer_config]\neta = 1.0\n', ["optimizer_config", "AdamW"]),
        ("seed = \n", ["run.toml", "line 1", "seed"]),
        ("eta = 1.0\n", ["run.toml", "'eta' does nothing outside of the table [optimizer_config]"]),
        (
            "[optimizer_config]\neta = 1.0\nseed = 1\n",
            ["run.toml", "'seed' is an option of the trainer; write it above"],
        ),
        ("seed = 1\n[b]\nseed = 2\n", ["run.toml", "'seed' stands in the file's beginning and in [b]; keep one"]),
        ("optimizer_args = ['eta=1']\n[optimizer_config]\neta = 2.0\n", ["'eta' stands in [optimizer_config] and in"]),
    ],
)
def test_mistakes(tmp_path, text, words):
    with pytest.raises(UserError) as raised:
        parse(["--config_file", written(tmp_path, text)])
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer_args", "eta"], ["eta", "no '='"]),
        (["--optimizer_args", "eta=1", "eta=2"], ["'eta' stands there twice"]),
        (["--optimizer_args", "etta=1.0"], ["optimizer_args", "etta", "'eta'"]),
        (["--optimizer_args", "lr=1e-4"], ["optimizer_args", "'lr'"]),
        (["--optimizer_args", "betas={[]:1}"], ["optimizer_args", "'betas'", "literal"]),
        (["--optimizer_type", "AdamW", "--optimizer_args", "eta"], ["optimizer_args: 'eta' has no '='"]),
        (["--config_file", "nowhere.toml"], ["nowhere.toml", "cannot be read"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    with pytest.raises(UserError) as raised:
        parse(arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_state_that_is_not_there_is_told_with_those_that_are(tmp_path):
    (tmp_path / "lora-step00000074-state").mkdir()
    with pytest.raises(UserError, match=r"not a folder; beside it: lora-step00000074-state$"):
        parse(["--resume", str(tmp_path / "lora-state")])


def test_embedded_by_flag_or_file(tmp_path):
    assert is_embedded(["--embedded"])
    assert is_embedded(["--config_file", written(tmp_path, "embedded = true\n")])
    assert not is_embedded(["--config_file", written(tmp_path, "seed = 1\n")])
    assert not is_embedded([])


def test_a_file_of_a_windows_editor_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "marked.toml"
    path.write_text("embedded = true\nseed = 3\n", "utf-8-sig")
    assert is_embedded(["--config_file", str(path)])
    assert parse(["--config_file", str(path)]).options.seed == 3


@pytest.mark.parametrize(
    "name", ["Automagic_CameAMP", "automagic_cameamp", "library.automagic_cameamp.Automagic_CameAMP"]
)
def test_optimizer_name_in_any_case(name):
    assert optimizer_name(name) == "Automagic_CameAMP"
    assert optimizer_name("AdamW") is None

"""Options: what is accepted, and what is said of what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from library.automagic_cameamp import Automagic_CameAMP, OptimizerConfig
from library.cameamp.options import parse_optimizer_args


def one_parameter():
    return [torch.nn.Parameter(torch.ones(4, 4))]


def test_defaults_are_the_published_ones():
    assert OptimizerConfig().as_dict() == {
        "lr": 1e-6, "min_lr": 1e-7, "max_lr": 1e-3, "lr_bump": 3e-6, "eps": (1e-30, 1e-16, 1e-8),
        "clip_threshold": 1.0, "betas": (0.8, 0.99, 0.999), "eta": 2.0, "beta1_decay": 0.9995, "weight_decay": 5e-4,
        "warmup_steps": 500, "came": True, "full_finetune": False, "verbose": False, "context_window": 100,
        "edge_threshold": 0.95, "adaptation_rate": 0.1, "momentum_scales": (1, 5, 10, 25), "blocksize": 4096,
        "fused": "auto", "factored": False, "cautious": False, "bias_correction": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, ["lr", "0.0", "1e-07", "0.001"]),
        ({"lr": 2e-3}, ["lr", "0.002", "max_lr"]),
        ({"lr": float("nan")}, ["lr", "nan", "finite"]),
        ({"min_lr": -1.0}, ["min_lr", "-1.0"]),
        ({"max_lr": 1e-8}, ["max_lr", "1e-08", "min_lr"]),
        ({"lr_bump": -1e-6}, ["lr_bump"]),
        ({"eps": (0.0, 1e-16, 1e-8)}, ["eps", "0.0", "1e-35"]),
        ({"betas": (0.8, 1.0, 0.999)}, ["betas", "1.0", "below 1"]),
        ({"clip_threshold": 0}, ["clip_threshold"]),
        ({"eta": 0.0}, ["eta"]),
        ({"eta": 1e-200}, ["eta"]),
        ({"clip_threshold": 10**400}, ["clip_threshold", "finite"]),
        ({"warmup_steps": 10**400}, ["warmup_steps", "up to"]),
        ({"beta1_decay": 1.5}, ["beta1_decay", "1.5"]),
        ({"weight_decay": -0.1}, ["weight_decay"]),
        ({"warmup_steps": -1}, ["warmup_steps", "-1"]),
        ({"context_window": 1}, ["context_window"]),
        ({"edge_threshold": 0.0}, ["edge_threshold"]),
        ({"adaptation_rate": 2.0}, ["adaptation_rate"]),
        ({"momentum_scales": (1, 1)}, ["momentum_scales", "different"]),
        ({"momentum_scales": (0, 5)}, ["momentum_scales", "at least 1"]),
        ({"blocksize": 100}, ["blocksize", "100", "power of two"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_out_of_range(options, words):
    with pytest.raises(ValueError, match="option") as raised:
        Automagic_CameAMP(one_parameter(), **options)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "options",
    [
        {"lr": "1e-4"}, {"lr": True}, {"lr": torch.tensor([1e-4, 1e-4])}, {"betas": 0.9}, {"betas": (0.9, 0.99)},
        {"betas": (0.9, "0.99", 0.999)}, {"warmup_steps": 10.0}, {"warmup_steps": True}, {"came": 1},
        {"verbose": "yes"}, {"momentum_scales": 5}, {"momentum_scales": (1.0, 2.0)},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"'{name}'.*allowed"):
        Automagic_CameAMP(one_parameter(), **options)


def test_all_options_of_another_optimizer_are_named():
    with pytest.raises(TypeError, match=r"^unknown options 'scale_parameter', 'relative_step'\. Known options: lr, "):
        OptimizerConfig.from_options({"scale_parameter": False, "eta": 1.0, "relative_step": False})


def test_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match=r"'warmup_step', did you mean 'warmup_steps'\?$"):
        Automagic_CameAMP(one_parameter(), warmup_step=5)


def test_numbers_are_normalized():
    config = OptimizerConfig(eps=[1e-30, 1e-16, 1e-8], clip_threshold=1, betas=[0, 0.5, 0.9])
    assert config == OptimizerConfig(betas=(0.0, 0.5, 0.9))
    assert isinstance(config.clip_threshold, float)
    assert isinstance(config.betas[0], float)


def test_config_cannot_be_changed_and_excludes_options():
    config = OptimizerConfig(lr=1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(TypeError, match="not both"):
        Automagic_CameAMP(one_parameter(), config=config, eta=1.0)
    with pytest.raises(TypeError, match="OptimizerConfig"):
        Automagic_CameAMP(one_parameter(), config={"lr": 1e-5})
    assert Automagic_CameAMP(one_parameter(), config=config).param_groups[0]["lr"] == 1e-5


def test_optimizer_args():
    assert parse_optimizer_args(["betas=(0.9,0.99,0.999)", "came=False", "warmup_steps=50"]) == {
        "betas": (0.9, 0.99, 0.999),
        "came": False,
        "warmup_steps": 50,
    }
    with pytest.raises(ValueError, match="no '='"):
        parse_optimizer_args(["came"])
    with pytest.raises(ValueError, match=r"'came'.*literal"):
        parse_optimizer_args(["came=false"])


def test_toml_table():
    table = {"betas": [0.9, 0.99, 0.999], "warmup_steps": 50, "eta": 1}
    config = OptimizerConfig.from_toml(table, "run.toml", {"warmup_steps": 60}, lr=1e-4)
    assert (config.betas, config.warmup_steps, config.eta, config.lr) == ((0.9, 0.99, 0.999), 60, 1.0, 1e-4)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"warmup_step": 5}, ["run.toml", "warmup_step", "did you mean 'warmup_steps'"]),
        ({"warmup_steps": 5.5}, ["run.toml", "warmup_steps", "whole number"]),
        ({"came": "true"}, ["run.toml", "came", "True or False"]),
        ({"betas": "0.8"}, ["run.toml", "betas", "three numbers", "[0.8, 0.99, 0.999]"]),
        ({"eps": 1e-8}, ["run.toml", "eps", "three numbers", "[1e-30, 1e-16, 1e-08]"]),
        ({"momentum_scales": "()"}, ["run.toml", "momentum_scales", "[1, 5, 10, 25]"]),
        ({"lr": 1e-4}, ["run.toml", "'lr'", "learning_rate"]),
        ({"min_lr": 1e-2}, ["run.toml", "max_lr"]),
    ],
)
def test_toml_mistakes(table, words):
    with pytest.raises(ValueError, match=r"run\.toml") as raised:
        OptimizerConfig.from_toml(table, "run.toml", {}, lr=1e-4)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_range_is_broken_where_it_is_written():
    with pytest.raises(ValueError, match=r"^optimizer_args: option 'warmup_steps' is -5"):
        OptimizerConfig.from_toml({"eta": 1.0}, "run.toml", {"warmup_steps": -5}, lr=1e-5)
    with pytest.raises(ValueError, match=r"^run\.toml: option 'warmup_steps' is -5"):
        OptimizerConfig.from_toml({"warmup_steps": -5}, "run.toml", {"eta": 1.0}, lr=1e-5)


def test_learning_rate_is_not_an_optimizer_arg():
    with pytest.raises(ValueError, match="optimizer_args: has the key 'lr'"):
        OptimizerConfig.from_toml({}, "run.toml", {"lr": 1e-4}, lr=1e-5)

"""The ready configurations: valid for our optimizer, and, where sd-scripts is at hand, for the real parsers."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import toml

from library.automagic_cameamp import OptimizerConfig
from library.cameamp_cli import optimizer_name

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.toml") if not path.name.startswith("embedded"))
SD_SCRIPTS = os.environ.get("SD_SCRIPTS_DIR", "")


def script_of(path):
    """The training script that the file's own command names."""
    found = re.search(r"--train_script (\w+)\.py", path.read_text("utf-8"))
    return found.group(1) if found else "train_network"


def test_there_is_one_for_each_kind_of_user():
    names = {path.stem for path in CONFIGS}
    assert names == {"sd15_lora", "sdxl_lora_8gb", "sdxl_lora_12gb", "sdxl_lora_24gb", "flux_lora", "sdxl_full"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_optimizer_exists_and_its_options_are_right(path):
    document = toml.loads(path.read_text("utf-8"))
    table = document.pop("optimizer_config")
    options = {key: value for section in document.values() for key, value in section.items()}
    assert optimizer_name(options["optimizer_type"])
    config = OptimizerConfig.from_toml(table, path.name, {}, lr=options["learning_rate"])
    assert config.warmup_steps <= options["max_train_steps"] / 2
    assert f"configs/{path.name}" in path.read_text("utf-8").partition("\n\n")[0]
    assert "save_state_on_train_end" not in options or f"output/{options['output_name']}-state" in path.read_text(
        "utf-8"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_real_parser_knows_every_key_and_takes_every_value(path, monkeypatch):
    if not SD_SCRIPTS:
        pytest.skip("SD_SCRIPTS_DIR is not set: no real parser to ask")
    pytest.importorskip("cv2", reason="sd-scripts' requirements are not installed")
    from library.cameamp_host.packages import join

    join(Path(SD_SCRIPTS).resolve())
    parser = importlib.import_module(script_of(path)).setup_parser()
    actions = {action.dest: action for action in parser._actions}
    document = toml.loads(path.read_text("utf-8"))
    document.pop("optimizer_config")
    argv = []
    for section in document.values():
        for key, value in section.items():
            assert key in actions, f"{key} is no option of {script_of(path)}.py"
            if value is True:
                argv.append(f"--{key}")
            else:
                argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    given = vars(parser.parse_args(argv))
    # What the parser makes of the words is what the file says, so that the host, which takes the file's values as they
    # are, gets values of the right types.
    for section in document.values():
        for key, value in section.items():
            assert given[key] == value, key
            assert type(given[key]) is type(value) or isinstance(value, (int, float)), key

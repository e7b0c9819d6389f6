"""The ready configurations: valid for our optimizer, and, where sd-scripts is at hand, for the real parsers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import toml
from sd_scripts.options import HAS_PARSERS, check_document, check_optimizer, flat

from library.cameamp.command_line import optimizer_name

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.toml") if not path.name.startswith("embedded"))


def script_of(path):
    """The training script that the file's own command names."""
    found = re.search(r"--train_script (\w+)\.py", path.read_text("utf-8"))
    return found.group(1) if found else "train_network"


def test_there_is_one_for_each_kind_of_user():
    names = {path.stem for path in CONFIGS}
    loras = {"sd15_lora", "sdxl_lora_8gb", "sdxl_lora_12gb", "sdxl_lora_24gb", "flux_lora"}
    assert names == loras | {"sdxl_full_16gb", "sdxl_full_24gb"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_optimizer_exists_and_its_options_are_right(path):
    options, table = flat(toml.loads(path.read_text("utf-8")))
    assert optimizer_name(options["optimizer_type"])
    config = check_optimizer(options, table, path.name)
    assert config.warmup_steps <= options["max_train_steps"] / 2
    assert f"configs/{path.name}" in path.read_text("utf-8").partition("\n\n")[0]
    assert "save_state_on_train_end" not in options or f"output/{options['output_name']}-state" in path.read_text(
        "utf-8"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_real_parser_knows_every_key_and_takes_every_value(path, monkeypatch):
    if not HAS_PARSERS:
        pytest.skip("SD_SCRIPTS_DIR is not set, or sd-scripts' requirements are not installed: no real parser to ask")
    check_document(script_of(path), toml.loads(path.read_text("utf-8")), monkeypatch)

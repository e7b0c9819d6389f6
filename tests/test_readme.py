"""The README's Python runs, and its table lists every option with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.automagic_cameamp import OptimizerConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_every_option_is_in_the_table_with_its_default():
    written = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \| .*\|$", README, re.MULTILINE):
        names = re.findall(r"`(\w+)`", row[0])
        values = eval(f"[{row[1]}]") if names and names[0] in OptimizerConfig().as_dict() else []
        written.update(zip(names, values))
    assert written == {name: value for name, value in OptimizerConfig().as_dict().items() if name in written}
    assert set(written) == set(OptimizerConfig().as_dict())


def test_the_pictures_and_files_it_names_exist():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).is_file(), path

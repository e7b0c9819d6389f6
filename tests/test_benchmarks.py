"""The benchmarks' command line: it lists every benchmark, and imports only the one that is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, main, question
from benchmarks.momentum_codes import recorded
from benchmarks.table import Table

ROOT = Path(__file__).resolve().parent.parent


def help_of(*words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_benchmark_is_listed_with_its_question(capsys):
    lines = [line.split(maxsplit=1) for line in help_of(capsys=capsys).splitlines()]
    for name in NAMES:
        assert [name, question(name)] in lines


def test_every_module_that_can_run_is_listed():
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef run(" in path.read_text("utf-8")}
    assert runnable == set(NAMES)


def test_the_list_imports_no_benchmark():
    code = """
import sys
from benchmarks.__main__ import main
try:
    main(["--help"])
except SystemExit:
    print(sorted(name for name in sys.modules if name.startswith(("torch", "library", "matplotlib", "benchmarks."))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['benchmarks.__main__']"


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_explains_itself_and_its_options(name, capsys):
    text = help_of(name, capsys=capsys)
    assert f"python -m benchmarks {name}" in text
    assert question(name) in text
    assert "options:" in text


def test_a_benchmark_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["step"])
    assert ended.value.code == 2
    assert "'step'" in capsys.readouterr().err


def test_momentum_codes_are_measured_on_gradients_of_a_training_run():
    """Of all but the first step, at which downs have none."""
    streams = recorded(4)
    assert len(streams) > 1
    assert all(len(stream) == 3 and stream.flatten(1).any(dim=1).all() for stream in streams)


def test_headings_stand_over_their_columns(capsys):
    table = Table("{:<6}{:>8.2f}{:>9.1%}", "name", "ratio", "share")
    table.row("a", 1.234, 0.5)
    assert capsys.readouterr().out.splitlines() == ["name     ratio    share", "a         1.23    50.0%"]

"""bootstrap.py: when it installs, and what."""

from __future__ import annotations

import pytest

import bootstrap


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A project whose virtual environment exists; the list of what pip was asked to install."""
    for name in bootstrap.NEEDED_BY_TESTS:
        (tmp_path / name).write_text(name, "utf-8")
    (tmp_path / ".venv").mkdir()
    asked = []
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "runs", lambda *arguments: True)
    monkeypatch.setattr(bootstrap, "run", lambda arguments: asked.append([w for w in arguments if w.endswith(".txt")]))
    return asked


def test_it_installs_once_for_each_command(installed):
    for _ in range(2):
        bootstrap.install(bootstrap.NEEDED_BY_DEMO)
        bootstrap.install(bootstrap.NEEDED_BY_TESTS)
    assert installed == [
        ["requirements.txt", "requirements-kernels.txt", "requirements-demo.txt"],
        ["requirements.txt", "requirements-kernels.txt", "requirements-demo.txt", "requirements-dev.txt"],
    ]


def test_it_installs_again_when_any_of_the_files_changes(installed, tmp_path):
    for name in bootstrap.NEEDED_BY_TESTS:
        bootstrap.install(bootstrap.NEEDED_BY_TESTS)
        (tmp_path / name).write_text("changed", "utf-8")
    bootstrap.install(bootstrap.NEEDED_BY_TESTS)
    assert len(installed) == 1 + len(bootstrap.NEEDED_BY_TESTS)


def test_nothing_is_noted_as_installed_if_pip_fails(installed, monkeypatch):
    def fail(arguments):
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(bootstrap, "run", fail)
        with pytest.raises(RuntimeError):
            bootstrap.install(bootstrap.NEEDED_BY_DEMO)
    bootstrap.install(bootstrap.NEEDED_BY_DEMO)
    assert len(installed) == 1

"""The shape of the code: what a module may import, and how large it may grow."""

from __future__ import annotations

import ast

import pytest
from documents import ROOT

ENGINE = ROOT / "library" / "cameamp"
MODULES = sorted(ENGINE.rglob("*.py"))


def imported(path):
    """The modules that a module imports, relative ones as they are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_classes_have_few_methods(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            methods = [item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
            assert len(methods) <= 20, node.name


def test_the_optimizer_is_short():
    assert len((ENGINE / "optimizer.py").read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", sorted((ENGINE / "techniques").glob("*.py")), ids=lambda path: path.stem)
def test_techniques_know_nothing_of_the_engine(path):
    assert {name for name in imported(path) if name.startswith("..")} == set()


@pytest.mark.parametrize("path", sorted((ENGINE / "storage").glob("*.py")), ids=lambda path: path.stem)
def test_storage_knows_nothing_of_what_it_stores(path):
    allowed = {"..rounding", "..devices"}
    assert {name for name in imported(path) if name.startswith("..")} <= allowed


def test_only_the_plugin_knows_a_trainer():
    hosts = ("accelerate", "diffusers", "library", "tqdm")
    for path in MODULES:
        if "sd_scripts" not in path.parts:
            assert not [name for name in imported(path) if name.split(".")[0] in hosts], path
            assert not [name for name in imported(path) if "sd_scripts" in name], path

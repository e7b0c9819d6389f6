"""What the picture of the architecture shows: imports as they are in the source, in layers, with cycles reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.architecture import draw
from benchmarks.imports import cycles, layers, members, read_imports, shortest, without_cycles

ENGINE = Path(__file__).resolve().parent.parent / "library" / "cameamp"
SOURCES = {
    "__init__.py": "",
    "top.py": "import math\nfrom . import middle\nfrom .low.one import x\n",
    "middle.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .top import y\n",
    "low/__init__.py": "from ..floor import z\nfrom . import one\n",
    "low/one.py": "def f():\n    from .. import middle\n",
    "floor.py": "import outside.floor\nfrom .. import above\n",
    "late.py": "import outside.package.floor\nfrom library.package.low import one\n",
}
IMPORTS = {
    "top": {"middle", "low"},
    "middle": set(),
    "low": {"floor", "middle"},
    "floor": set(),
    "late": {"floor", "low"},
}


@pytest.fixture
def package(tmp_path):
    for name, source in SOURCES.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
    return tmp_path / "package"


def test_relative_absolute_and_late_imports_are_read(package):
    assert read_imports(package) == IMPORTS
    assert members(package) == {"low": ["one"]}


def test_the_package_itself_is_a_part_if_it_imports(package):
    (package / "__init__.py").write_text("from .top import x", "utf-8")
    assert read_imports(package) == {**IMPORTS, "__init__": {"top"}}


def test_what_follows_from_a_chain_is_left_out():
    assert shortest(IMPORTS) == {**IMPORTS, "top": {"low"}, "late": {"low"}}


def test_every_part_lies_below_what_imports_it():
    rows = layers(IMPORTS, dict.fromkeys(IMPORTS, 1.0), 10)
    assert rows == [["late", "top"], ["low"], ["floor", "middle"]]


def test_a_full_row_is_continued_above():
    rows = layers(IMPORTS, dict.fromkeys(IMPORTS, 1.0), 1.5)
    assert rows == [["top"], ["late"], ["low"], ["middle"], ["floor"]]


def test_cycles_are_reported(package, tmp_path):
    assert cycles(IMPORTS) == []
    (package / "floor.py").write_text("from .top import x", "utf-8")
    graph = read_imports(package)
    assert cycles(graph) == [["floor", "low", "top"]]
    rest, closing = without_cycles(graph)
    assert cycles(rest) == []
    assert len(closing) == 1
    assert {(a, b) for a in graph for b in graph[a]} == {(a, b) for a in rest for b in rest[a]} | set(closing)
    assert draw(package, tmp_path / "picture.png") == closing


def test_the_engine_has_no_cycles():
    graph = read_imports(ENGINE)
    assert {"optimizer", "storage", "techniques"} <= graph.keys()
    assert cycles(graph) == []


def test_techniques_import_nothing_of_the_engine():
    assert read_imports(ENGINE)["techniques"] == set()


def test_the_picture_is_the_same_every_time(tmp_path):
    for name in ("one.png", "two.png"):
        assert draw(ENGINE, tmp_path / name) == []
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").stat().st_size < 150_000

"""Which parts of a package import which: read from the source, put in layers, checked for cycles.

A part is a top-level module of the package or a sub-package with everything in it. Nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path

Graph = dict[str, set[str]]


def read_imports(package: Path) -> Graph:
    """The parts of a package that each of its parts imports, by name.

    The `__init__.py` of the package itself is a part only if it imports another one. Imports that only type checkers
    see do not count.

    Args:
        package: the folder of the package.
    """
    modules = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: Graph = {}
    for name, path in modules.items():
        own = _part(name)
        imported = {_part(found) for found in _imported(name, path, modules)}
        graph.setdefault(own, set()).update(imported - {own})
    if not graph.get("__init__", {"something"}):
        del graph["__init__"]
    return {part: imported & graph.keys() for part, imported in graph.items()}


def members(package: Path) -> dict[str, list[str]]:
    """The modules of each sub-package, by its name."""
    folders = sorted(path.parent for path in package.glob("*/__init__.py"))
    return {f.name: sorted(path.stem for path in f.glob("*.py") if path.stem != "__init__") for f in folders}


def cycles(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The groups of parts that import one another, directly or through others; empty if there are none."""
    reached = {part: _reachable(graph, part) for part in graph}
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def without_cycles(graph: Mapping[str, Collection[str]]) -> tuple[Graph, list[tuple[str, str]]]:
    """The graph without the imports that close a cycle, and these imports."""
    acyclic: Graph = {part: set() for part in graph}
    closing = []
    for part in sorted(graph):
        for imported in sorted(graph[part]):
            if part in _reachable(acyclic, imported) | {imported}:
                closing.append((part, imported))
            else:
                acyclic[part].add(imported)
    return acyclic, closing


def shortest(graph: Mapping[str, Collection[str]]) -> Graph:
    """A graph without cycles, less every import that also follows from a longer chain of imports."""
    return {
        part: {b for b in imported if not any(b in _reachable(graph, other) for other in imported)}
        for part, imported in graph.items()
    }


def layers(graph: Mapping[str, Collection[str]], widths: Mapping[str, float], limit: float) -> list[list[str]]:
    """The parts of a graph without cycles in rows, each below everything that imports it; the top row first.

    A part lies as low as the longest chain of its imports allows, or higher if the rows there are full.

    Args:
        graph: the imports.
        widths: the width of each part.
        limit: the largest width of a row; only a part that is wider by itself exceeds it.
    """
    rows: list[list[str]] = []
    place: dict[str, int] = {}
    for part in _imported_first(graph):
        row = max((place[imported] + 1 for imported in graph[part]), default=0)
        while row < len(rows) and sum(widths[other] for other in rows[row]) + widths[part] > limit:
            row += 1
        if row == len(rows):
            rows.append([])
        rows[row].append(part)
        place[part] = row
    return rows[::-1]


def _imported_first(graph: Mapping[str, Collection[str]]) -> Iterator[str]:
    """The parts in an order in which each follows what it imports."""
    left = sorted(graph)
    done: set[str] = set()
    while left:
        ready = [part for part in left if done.issuperset(graph[part])]
        yield from ready
        done.update(ready)
        left = [part for part in left if part not in done]


def _reachable(graph: Mapping[str, Collection[str]], start: str) -> set[str]:
    """What a part imports, directly or through others."""
    found: set[str] = set()
    new = set(graph[start])
    while new:
        found |= new
        new = {after for part in new for after in graph[part]} - found
    return found


def _name(path: Path, package: Path) -> str:
    """The dotted name of a module, the package's own name first."""
    words = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def _part(module: str) -> str:
    return (*module.split("."), "__init__")[1]


def _imported(module: str, path: Path, modules: Collection[str]) -> Iterator[str]:
    """The modules of the package that one of them imports."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # What is imported from a module may be a module itself or something in it.
            inside = _from_package(name, package.partition(".")[0])
            yield from [found for found in (inside, inside.rpartition(".")[0]) if found in modules][:1]


def _origin(node: ast.ImportFrom, package: str) -> str:
    """The module that names are imported from; without a name if that is above the package."""
    try:
        return resolve_name("." * node.level + (node.module or ""), package)
    except ImportError:
        return ""


def _from_package(name: str, package: str) -> str:
    """An absolute name from the package's own name on, whatever folders the package lies in."""
    words = name.split(".")
    return ".".join(words[words.index(package) :]) if package in words else ""


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of the code that runs, also in functions; not the bodies of `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from _nodes(other)
        else:
            yield from _nodes(child)

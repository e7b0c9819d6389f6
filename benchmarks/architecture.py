"""The picture of what imports what in the engine. Rows, order and arrows are computed from the imports.

The usual steps of drawing a graph in layers (Sugiyama's method): rows by the longest chain of imports; arrows that pass
a row get a place of their own in it; the order within rows is improved in sweeps, each of which puts what it can near
the mean of its neighbours; the places are the closest ones to these means that do not overlap.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
from PIL import Image

from .imports import layers, members, read_imports, shortest, without_cycles

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

# Inches. Letters are those of the fonts below, with room to spare.
_WIDTH = 9.6
_GAP = 0.16
_ROW_GAP = 0.42
_BEND = 0.1
_LINE, _MARGIN = 0.16, 0.14
_NAME_LETTER, _MEMBER_LETTER = 0.088, 0.062
_MEMBERS_LINE = 34  # letters
_SWEEPS = 40

_PACKAGE, _MODULE = "#dbe9f6", "#f3f3f3"

# A part of the package by its name; or the place of an arrow in a row that it passes, by its ends and the row.
Node = Any
Rows = list[list[Node]]


class Box(NamedTuple):
    """What is written in a box, and its size."""

    name: str
    lines: list[str]
    width: float
    height: float


def draw(package: Path, path: Path) -> list[tuple[str, str]]:
    """Draw the parts of a package as boxes and their imports as arrows.

    Returns:
        The imports that close a cycle, which are drawn in red.
    """
    graph, closing = without_cycles(read_imports(package))
    inner = members(package)
    boxes = {part: _box(part, inner.get(part)) for part in graph}
    arrows = [(a, b) for a, imported in sorted(shortest(graph).items()) for b in sorted(imported)]
    widths = {part: box.width + _GAP for part, box in boxes.items()}
    rows, ways = _with_bends(layers(graph, widths, 0.9 * _WIDTH), arrows)
    sizes = {node: boxes[node].width if node in boxes else _BEND for row in rows for node in row}
    x = _places(rows, [link for way in ways for link in pairwise(way)], sizes)
    y, height = _spans(rows, boxes)

    figure, axis = plt.subplots(figsize=(_WIDTH, height))
    axis.set_position((0, 0, 1, 1))
    axis.set_xlim(0, _WIDTH)
    axis.set_ylim(0, height)
    axis.axis("off")
    for part, box in boxes.items():
        _draw_box(axis, box, x[part], y[part][1], _PACKAGE if part in inner else _MODULE)
    for way, ends in zip(ways, _ends(ways, x, boxes)):
        _draw_arrow(axis, way, ends, x, y)
    for a, b in closing:
        style = {"arrowstyle": "-|>", "color": "C3", "linewidth": 1.5}
        axis.annotate("", xy=(x[b], mean(y[b])), xytext=(x[a], mean(y[a])), arrowprops=style, zorder=3)
    note = f"Arrows point to what is imported in {package.parent.name}/{package.name}/. An import that follows from a "
    axis.text(_WIDTH / 2, 0.12, f"{note}chain of arrows has no arrow of its own.", ha="center", fontsize=8, color="0.3")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    # A few shades are enough for lines and letters, and take a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)
    return closing


def _box(part: str, inner: Sequence[str] | None) -> Box:
    name = f"{part}.py" if inner is None else f"{part}/"
    lines = textwrap.wrap(", ".join(inner or ()), _MEMBERS_LINE)
    width = max(_NAME_LETTER * len(name), *(_MEMBER_LETTER * len(line) for line in lines), 0) + 2 * _MARGIN
    return Box(name, lines, width, _LINE * (1 + len(lines)) + 1.5 * _MARGIN)


def _with_bends(layered: list[list[str]], arrows: Sequence[tuple[str, str]]) -> tuple[Rows, list[list[Node]]]:
    """The rows with a place for every arrow that passes them, and the way of each arrow from row to row."""
    rows: Rows = [list(row) for row in layered]
    row_of = {part: number for number, row in enumerate(rows) for part in row}
    ways = []
    for a, b in arrows:
        bends = [(a, b, number) for number in range(row_of[a] + 1, row_of[b])]
        for bend in bends:
            rows[bend[2]].append(bend)
        ways.append([a, *bends, b])
    return rows, ways


def _places(rows: Rows, links: Sequence[tuple[Node, Node]], sizes: Mapping[Node, float]) -> dict[Node, float]:
    """Where along its row everything lies. Puts each row in its order."""
    above: dict[Node, list[Node]] = {node: [] for node in sizes}
    below: dict[Node, list[Node]] = {node: [] for node in sizes}
    for a, b in links:
        below[a].append(b)
        above[b].append(a)
    x: dict[Node, float] = {}
    for row in rows:
        x |= _spread(row, dict.fromkeys(row, _WIDTH / 2), sizes)
    best = ([list(row) for row in rows], _crossings(rows, links))
    for sweep in range(_SWEEPS):
        neighbours = (above, below)[sweep % 2]
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {node: mean(x[n] for n in neighbours[node]) if neighbours[node] else x[node] for node in row}
            row.sort(key=lambda node: (wanted[node], x[node]))
            x |= _spread(row, wanted, sizes)
        if (crossings := _crossings(rows, links)) < best[1]:
            best = [list(row) for row in rows], crossings
    rows[:] = best[0]
    for _ in range(_SWEEPS):
        for row in rows:
            wanted = {node: mean([x[n] for n in (*above[node], *below[node])] or [x[node]]) for node in row}
            x |= _spread(row, wanted, sizes)
    return x


def _spread(row: Sequence[Node], wanted: Mapping[Node, float], sizes: Mapping[Node, float]) -> dict[Node, float]:
    """The places in this order nearest to the wanted ones, in least squares, that leave gaps and fit the width."""
    offsets = [0.0]
    for a, b in pairwise(row):
        offsets.append(offsets[-1] + (sizes[a] + sizes[b]) / 2 + _GAP)
    # Less the offsets, places must not decrease: neighbours that would are merged at their mean.
    merged: list[list[float]] = []
    for node, offset in zip(row, offsets):
        merged.append([wanted[node] - offset])
        while len(merged) > 1 and mean(merged[-2]) > mean(merged[-1]):
            merged[-2:] = [merged[-2] + merged[-1]]
    first = _GAP + sizes[row[0]] / 2
    last = max(first, _WIDTH - _GAP - sizes[row[-1]] / 2 - offsets[-1])
    level = [min(max(mean(block), first), last) for block in merged for _ in block]
    return {node: offset + base for node, offset, base in zip(row, offsets, level)}


def _crossings(rows: Rows, links: Sequence[tuple[Node, Node]]) -> int:
    """How many pairs of links cross."""
    place = {node: (number, index) for number, row in enumerate(rows) for index, node in enumerate(row)}
    found = 0
    for (a, b), (c, d) in combinations(links, 2):
        if place[a][0] == place[c][0]:
            found += (place[a][1] - place[c][1]) * (place[b][1] - place[d][1]) < 0
    return found


def _spans(rows: Rows, boxes: Mapping[str, Box]) -> tuple[dict[Node, tuple[float, float]], float]:
    """Bottom and top of everything, a passing arrow's being its row's, and the height of the picture."""
    spans: dict[Node, tuple[float, float]] = {}
    bottom = 0.4
    for row in reversed(rows):
        tallest = max(boxes[node].height for node in row if node in boxes)
        for node in row:
            height = boxes[node].height if node in boxes else tallest
            spans[node] = bottom + (tallest - height) / 2, bottom + (tallest + height) / 2
        bottom += tallest + _ROW_GAP
    return spans, bottom - _ROW_GAP + _GAP


def _ends(ways: Sequence[list[Node]], x: Mapping[Node, float], boxes: Mapping[str, Box]) -> list[tuple[float, float]]:
    """Where each arrow leaves its first box and meets its last: spread along the edges, in the order of their ways."""
    ends = []
    for way in ways:
        (first, after), (before, last) = way[:2], way[-2:]
        out = sorted(x[other[1]] for other in ways if other[0] == first)
        into = sorted(x[other[-2]] for other in ways if other[-1] == last)
        ends.append((_end(boxes[first], x[first], out, x[after]), _end(boxes[last], x[last], into, x[before])))
    return ends


def _end(box: Box, middle: float, others: list[float], own: float) -> float:
    """Where on a box's edge an arrow ends that comes from `own`, among all that end there."""
    step = min(0.3, 0.8 * box.width / len(others))
    return middle + step * (others.index(own) - (len(others) - 1) / 2)


def _draw_box(axis: Any, box: Box, x: float, top: float, color: str) -> None:
    corner = (x - box.width / 2, top - box.height)
    style = "round,pad=0,rounding_size=0.06"
    axis.add_patch(FancyBboxPatch(corner, box.width, box.height, style, facecolor=color, edgecolor="0.4", zorder=2))
    first = top - 0.75 * _MARGIN - _LINE / 2
    axis.text(x, first, box.name, ha="center", va="center", fontsize=9, fontweight="bold", zorder=4)
    for number, line in enumerate(box.lines, start=1):
        axis.text(x, first - number * _LINE, line, ha="center", va="center", fontsize=7.5, zorder=4)


def _draw_arrow(
    axis: Any,
    way: Sequence[Node],
    ends: tuple[float, float],
    x: Mapping[Node, float],
    y: Mapping[Node, tuple[float, float]],
) -> None:
    """A curve between rows, a straight line down through the rows that it passes."""
    first, *bends, last = way
    vertices, codes = [(ends[0], y[first][0])], [Curve.MOVETO]
    for target, (bottom, top) in [*((x[bend], y[bend]) for bend in bends), (ends[1], (y[last][1], y[last][1]))]:
        from_x, from_y = vertices[-1]
        middle = (from_y + top) / 2
        vertices += [(from_x, middle), (target, middle), (target, top)]
        codes += [Curve.CURVE4] * 3
        if bottom < top:
            vertices.append((target, bottom))
            codes.append(Curve.LINETO)
    axis.add_patch(
        FancyArrowPatch(
            path=Curve(vertices, codes), arrowstyle="-|>", mutation_scale=9, color="0.35", linewidth=0.9, zorder=1
        )
    )

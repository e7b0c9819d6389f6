"""What the documents consist of: code blocks, commands, links, headings, tables."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / name for name in ("README.md", "README.zh-TW.md", "README.ja.md")]
DOCUMENTS = [*READMES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMAND = r"(?:\w+=\S+ )*(?:python|accelerate launch|pip install) \S"


class Block(NamedTuple):
    """A fenced block: where it begins, its language, and what is in it."""

    place: str
    language: str
    text: str


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def place(path: Path, text: str, position: int) -> str:
    """File and line, for messages and names of tests."""
    return f"{path.relative_to(ROOT).as_posix()}:{text.count(chr(10), 0, position) + 1}"


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = read(path)
    return [
        Block(place(path, text, found.start()), found[2], textwrap.dedent(found[3])) for found in _FENCE.finditer(text)
    ]


def prose(path: Path) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", read(path))


def commands(path: Path) -> list[tuple[str, str]]:
    """Every command line with its place: in bash blocks, in indented blocks, in the text between backticks."""
    text = read(path)
    found = [
        (block.place, line)
        for block in blocks(path)
        if block.language == "bash"
        for line in block.text.splitlines()
        if line and not line.startswith("#")
    ]
    # In an indented block what follows two spaces is an explanation.
    for pattern in (rf"^    ({_COMMAND}.*?)(?:  .*)?$", rf"`({_COMMAND}[^`]*)`"):
        found += [(place(path, text, m.start()), m[1]) for m in re.finditer(pattern, text, re.MULTILINE)]
    return found


def links(text: str) -> list[str]:
    """The targets of the links and pictures of a text."""
    return re.findall(r"\]\(([^)\s]+)\)", text)


def names(text: str) -> Counter[str]:
    """What stands between backticks."""
    return Counter(re.findall(r"`[^`]+`", text))


def numbers(text: str) -> Counter[str]:
    """The numbers of a text that are neither part of a name nor of a link's target."""
    return Counter(re.findall(r"\d(?:[\d.,e-]*\d)?", re.sub(r"`[^`]+`|\]\([^)]*\)", "", text)))


def headings(path: Path) -> list[tuple[int, str]]:
    """Level and text of each heading."""
    return [(len(level), title) for level, title in re.findall(r"^(#+) (.+)$", prose(path), re.MULTILINE)]


def anchors(path: Path) -> set[str]:
    """What a link can name within a document, as GitHub makes it of the headings."""
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for _, title in headings(path)]
    return {title.replace(" ", "-") for title in plain}


def sections(path: Path) -> list[str]:
    """The document cut at its headings, without its fenced blocks."""
    return re.split(r"^#+ .+$", prose(path), flags=re.MULTILINE)


def tables(path: Path) -> list[list[list[str]]]:
    """The tables of a document, as rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(path), re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]

"""What the command lines share: mistakes shown as one line, TOML files, the names of the optimizers.

Imports no slow package, so that a mistake is reported at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __all__ as _public_names

OWN_OPTIMIZERS = tuple(name for name in _public_names if name.startswith("Automagic_CameAMP"))

# The modules that hold them: in a checkout, and as pip installs them. A path of either means the classes at hand.
_OWN_MODULES = ("library.automagic_cameamp", "automagic_cameamp")


class UserError(Exception):
    """A mistake that the user can correct; shown as one line, without a traceback."""


def run(train: Callable[[Sequence[str]], int], arguments: Sequence[str], usage: str) -> int:
    """Run a command line, and show its user's mistakes as one line.

    Args:
        train: what to run with the arguments; returns the exit code.
        arguments: the words of the command line.
        usage: what to print before `train` shows its own help.

    Returns:
        The exit code, 2 for a mistake.
    """
    print_any_name()
    asks_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    if asks_for_help:
        print(usage)
    try:
        return train(arguments)
    except UserError as error:
        if asks_for_help:
            print(f"The script's own options cannot be shown: {error}")
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 2


def print_any_name() -> None:
    """Let prints escape the characters that the console's encoding lacks, which many Windows consoles do."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def optimizer_name(optimizer_type: str) -> str | None:
    """The optimizer of this family that `optimizer_type` names, in any letter case or by a dotted path; else None."""
    module, _, short = optimizer_type.lower().rpartition(".")
    if module not in ("", *_OWN_MODULES):
        return None
    return next((name for name in OWN_OPTIMIZERS if name.lower() == short), None)


def misspelt_name(optimizer_type: str) -> str | None:
    """The optimizer of this family that a name means that no trainer knows; None for names of other optimizers."""
    module, _, short = optimizer_type.rpartition(".")
    if optimizer_name(optimizer_type) is not None:
        return None
    by_letters = {_letters(name): name for name in OWN_OPTIMIZERS}
    near = difflib.get_close_matches(_letters(short), by_letters, n=1, cutoff=0.75)
    nearest = by_letters[near[0]] if near else OWN_OPTIMIZERS[0]
    if not module:
        is_meant = bool(near) or "cameamp" in _letters(short) or _letters(short).startswith("automagic")
        return nearest if is_meant else None
    if module.lower() in _OWN_MODULES:
        return f"{module.lower()}.{nearest}"
    close = difflib.get_close_matches(module.lower(), _OWN_MODULES, n=1, cutoff=0.8)
    return f"{close[0]}.{nearest}" if near and close and not _exists(module) else None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def config_path(path: str) -> str:
    """The file that `--config_file` names; like sd-scripts, `.toml` may be left out."""
    return path if path.endswith(".toml") else path + ".toml"


def flattened(document: Mapping[str, Any]) -> dict[str, Any]:
    """One level of tables taken away, as sd-scripts does it; [optimizer_config] is a table of its own."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict) and name != "optimizer_config":
            flat.update(value)
        else:
            flat[name] = value
    return flat


def refuse_keys_of_the_trainer(table: Any, known: Collection[str], source: str) -> None:
    """Refuse an option of the trainer in [optimizer_config], such as one written below the table by mistake.

    Args:
        table: [optimizer_config] of the TOML file; anything but a table is left to others.
        known: the trainer's own options.
        source: the TOML file's path.

    Raises:
        UserError: with the first such key.
    """
    for key in table if isinstance(table, dict) else ():
        if key in known:
            raise UserError(
                f"{source}: [optimizer_config]: '{key}' is an option of the trainer; "
                "write it above the line [optimizer_config]"
            )


def refuse_repeated_keys(document: Mapping[str, Any], source: str) -> None:
    """Refuse a key that stands in several places of a TOML file; sd-scripts would take the last one without a word.

    The words of `optimizer_args` are such a place: those of the command line win over the table, those of the file are
    beside it.

    Raises:
        UserError: with the key and two places.
    """
    table, words = document.get("optimizer_config"), flattened(document).get("optimizer_args")
    for word in words if isinstance(words, list) else ():
        key = str(word).partition("=")[0]
        if isinstance(table, dict) and key in table:
            raise UserError(f"{source}: '{key}' stands in [optimizer_config] and in optimizer_args; keep one")
    places: dict[str, str] = {}
    for name, value in document.items():
        tabled = isinstance(value, dict)
        for key in value if tabled else [name]:
            place = f"[{name}]" if tabled else "the file's beginning"
            if key in places:
                raise UserError(f"{source}: '{key}' stands in {places[key]} and in {place}; keep one")
            places[key] = place


def read_toml(path: str, marked: bool = True) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        marked: whether the file may begin with a byte-order mark, which some Windows editors write.

    Raises:
        UserError: it cannot be read, or is not valid TOML; with the line and its key. Or the package toml is missing.
    """
    try:
        import toml
    except ImportError as error:
        raise UserError(f"{path}: reading it needs toml: pip install toml ({error})") from None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not encoded as UTF-8; save it as UTF-8") from None
    if "\0" in text:  # UTF-16 without a mark, of plain letters.
        raise UserError(f"{path}: is not encoded as UTF-8; save it as UTF-8")
    if text.startswith("\ufeff") and not marked:
        raise UserError(
            f"{path}: begins with a byte-order mark, with which sd-scripts loses its first key; "
            "save it as UTF-8 without BOM"
        )
    text = text.removeprefix("\ufeff")
    try:
        document: dict[str, Any] = toml.loads(text)
    except toml.TomlDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        # Neither the line nor what the parser quotes of it: that may be a token.
        key = re.match(r"\s*([\w.-]+)\s*[=:]", line)
        where = f"{path}, line {error.lineno}" + (f", key '{key[1]}'" if key else "")
        reason = error.msg.partition(": ")[0].rstrip(".!")
        hint = ""
        if "homogeneous" in str(error):
            hint = " Numbers of one list must be all whole or all decimal: write 1.0 beside 0.8, not 1."
        elif re.search(r"=\s*\(", line):
            hint = " A list has square brackets: [1, 5]."
        raise UserError(f"{where}: {reason}.{hint}") from None
    except Exception:
        # For some mistakes, such as a table with the name of a key, the parser itself fails with another error.
        raise UserError(f"{path}: is not valid TOML") from None
    return document

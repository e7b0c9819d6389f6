"""What the command lines share: mistakes shown as one line, TOML files, the names of the optimizers.

Imports no slow package, so that a mistake is reported at once.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
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

"""What the command lines share: mistakes shown as one line, TOML files, the names of our optimizers.

Imports no slow package, so that a mistake is reported at once.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toml

OWN_OPTIMIZERS = (
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
)


class UserError(Exception):
    """A mistake that the user can mend; shown as one line, without a traceback."""


def print_any_name() -> None:
    """Let prints show names that the console's encoding lacks, as Windows' often does, in place of failing at them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def optimizer_name(optimizer_type: str) -> str | None:
    """The name of our optimizer that `optimizer_type` means, in any letter case or as a dotted path; else None."""
    module, _, short = optimizer_type.lower().rpartition(".")
    if module not in ("", "library.automagic_cameamp"):
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
        marked: whether a byte-order mark may stand before it, as Windows editors put it there.

    Raises:
        UserError: it cannot be read, or is not valid TOML; with the line and its key.
    """
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
        return toml.loads(text)
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
        # Of some mistakes, such as a table where its name has a value already, the parser itself makes another error.
        raise UserError(f"{path}: is not valid TOML") from None

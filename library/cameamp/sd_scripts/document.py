"""Checks of the TOML file that `--config_file` names: keys in places where they mean nothing, or two things."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from ..command_line import UserError, flattened, refuse_keys_of_the_trainer, refuse_repeated_keys
from ..config import OPTION_NAMES


def check_places(document: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Refuse keys that sd-scripts reads and never uses, that belong into another table, or that stand in two.

    Args:
        document: the TOML file.
        known: sd-scripts' own options.
        source: the TOML file's path.

    Raises:
        UserError: with the first such key or table.
    """
    _refuse_what_the_host_drops(document, known, source)
    refuse_keys_of_the_trainer(document.get("optimizer_config"), set(known).difference(OPTION_NAMES), source)
    refuse_repeated_keys(document, source)


def _refuse_what_the_host_drops(document: Mapping[str, Any], known: Collection[str], source: str) -> None:
    for name, value in document.items():
        misnamed = name == "optimizer_args" or get_close_matches(name, ["optimizer_config"], cutoff=0.8)
        if isinstance(value, dict) and name != "optimizer_config" and misnamed:
            raise UserError(f"{source}: [{name}] does nothing; the optimizer's options stand in [optimizer_config]")
    for key in flattened(document):
        if key in OPTION_NAMES and key not in known:
            raise UserError(f"{source}: '{key}' does nothing outside of the table [optimizer_config]")

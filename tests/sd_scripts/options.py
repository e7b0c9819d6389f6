"""Options of sd-scripts, as files and command lines give them, held against our checks and its own parsers."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from library.automagic_cameamp import OptimizerConfig
from library.cameamp.command_line import config_path, optimizer_name, read_toml
from library.cameamp.options import parse_optimizer_args

CHECKOUT = os.environ.get("SD_SCRIPTS_DIR", "")
# Its parsers can be had: there is a checkout, and what it imports is installed.
HAS_PARSERS = bool(CHECKOUT) and importlib.util.find_spec("cv2") is not None

# What sd-scripts takes beside ours, for documents that tell how to come from there.
OTHER_OPTIMIZERS = ("AdamW", "AdamW8bit", "Prodigy")


def parser_of(script):
    """The real parser of a training script, which is named without its suffix."""
    from library.cameamp.sd_scripts.packages import join

    join(Path(CHECKOUT).resolve())
    return importlib.import_module(script).setup_parser()


def flat(document):
    """A TOML file's options without its tables, as sd-scripts reads them, and our table of it."""
    options = {}
    for name, value in document.items():
        if name != "optimizer_config":
            options.update(value if isinstance(value, dict) else {name: value})
    return options, document.get("optimizer_config", {})


def check_optimizer(options, table, source):
    """Assert that the optimizer is known and, if it is ours, build its configuration.

    Returns:
        The configuration, or None.
    """
    name = options.get("optimizer_type") or "AdamW"
    if optimizer_name(name) is None:
        assert name in OTHER_OPTIMIZERS, f"{name} is no optimizer"
        assert not table
        return None
    arguments = parse_optimizer_args(options.get("optimizer_args") or [])
    return OptimizerConfig.from_toml(table, source, arguments, lr=options["learning_rate"])


def check_document(script, document, monkeypatch):
    """Assert that the real parser knows every key of a TOML file, and makes of the words what the file says.

    The host takes the file's values as they are, so they are to be of the types that its parser would give.
    """
    parser = parser_of(script)
    actions = {action.dest: action for action in parser._actions}
    options, _ = flat(document)
    argv = []
    for key, value in options.items():
        assert key in actions, f"{key} is no option of {script}.py"
        if value is True:
            argv.append(f"--{key}")
        else:
            argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    given = vars(parser.parse_args(argv))
    for key, value in options.items():
        assert given[key] == value, key
        assert type(given[key]) is type(value) or isinstance(value, (int, float)), key


def check_arguments(script, words, monkeypatch):
    """Assert that a training script would take a command line: by our checks, and by its parser where there is one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file")
    parser.add_argument("--optimizer_type")
    parser.add_argument("--optimizer_args", nargs="*")
    parser.add_argument("--learning_rate", type=float)
    known, _ = parser.parse_known_args(words)
    given = {key: value for key, value in vars(known).items() if value is not None}
    options, table = {"learning_rate": OptimizerConfig().lr}, {}
    if known.config_file:
        options, table = flat(read_toml(config_path(known.config_file)))
    check_optimizer({**options, **given}, table, "the command line")
    if HAS_PARSERS:
        monkeypatch.setattr(sys, "argv", [script, *words])
        parser_of(script).parse_args(words)

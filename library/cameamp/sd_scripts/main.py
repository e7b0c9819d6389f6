"""The command line in front of a training script of sd-scripts."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ..command_line import UserError
from .checkout import find_sd_scripts, find_training_script
from .packages import join


def main(arguments: Sequence[str]) -> int:
    """Run a training script of sd-scripts as if it had been started directly, with these optimizers known to it.

    Args:
        arguments: the plugin's options (those of `_parser`) and the script's.

    Returns:
        0. A script that exits by itself raises SystemExit.

    Raises:
        UserError: sd-scripts or the script cannot be found, or an option is wrong; no model has been loaded.
    """
    own, theirs = _parser().parse_known_args(arguments)
    sd_scripts = find_sd_scripts(own.sd_scripts, os.environ, Path.cwd())
    script = find_training_script(sd_scripts, own.train_script)
    join(sd_scripts)
    try:
        train_util = importlib.import_module("library.train_util")
    except ImportError as error:
        raise UserError(
            f"sd-scripts in {sd_scripts} cannot be imported: {error}. Activate the environment in which it runs, or "
            "install what it needs as its README says, in its folder"
        ) from error
    from .plugin import Plugin

    Plugin(own.print_optimizer_config, own.new_learning_rate_on_resume).install(train_util)
    # The script reads them with argparse, and spawned workers inherit them.
    sys.argv = [str(script), *theirs]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sd_scripts", metavar="DIR")
    parser.add_argument("--train_script", default="train_network.py")
    parser.add_argument("--print_optimizer_config", action="store_true")
    parser.add_argument("--new_learning_rate_on_resume", action="store_true")
    return parser

"""The options of a training run, from a TOML file and the command line. They are checked before anything is loaded.

The names are those of sd-scripts. This module imports neither torch nor any other slow package, so that a mistake is
reported at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cameamp.command_line import (
    OWN_OPTIMIZERS,
    UserError,
    config_path,
    flattened,
    optimizer_name,
    read_toml,
    refuse_keys_of_the_trainer,
    refuse_repeated_keys,
)
from ..cameamp.config import OPTION_NAMES, OptimizerConfig
from ..cameamp.options import nearest_name, parse_optimizer_args
from .files import find_folder


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Options:
    """A run of the embedded trainer. The help texts say what each option means."""

    optimizer_type: str = _option(
        "Automagic_CameAMP", "one of the Automagic_CameAMP classes, in any letter case, or a class of torch.optim"
    )
    optimizer_args: tuple[str, ...] = _option(
        (), "options of the optimizer, key=value; they win over [optimizer_config]"
    )
    learning_rate: float = _option(1e-6, "learning rate")
    lr_scheduler: str = _option("constant", "learning-rate scheduler, by diffusers' name")
    lr_warmup_steps: int = _option(0, "warm-up steps of the scheduler")
    max_train_steps: int = _option(500, "optimizer steps to train")
    train_batch_size: int = _option(32, "images in a batch")
    gradient_accumulation_steps: int = _option(1, "batches in an optimizer step")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm to this; 0 for no clipping")
    mixed_precision: str = _option("no", "precision of the forward pass", choices=("no", "bf16"))
    network_dim: int = _option(8, "rank of the LoRA")
    network_alpha: float = _option(8.0, "alpha of the LoRA; its output is scaled by alpha / rank")
    seed: int = _option(42, "seed of weights, batches and noise")
    output_dir: str = _option("output", "folder to write to")
    output_name: str = _option("lora", "name that the written files start with")
    save_every_n_steps: int = _option(0, "also save the LoRA, and the state with --save_state, every so many steps")
    save_state: bool = _option(False, "save what --resume needs, at the end and with every save")
    resume: str = _option("", "state folder to continue from")
    logging_dir: str = _option("", "folder of the tensorboard logs; if not given, logs in the output folder")
    validate_every_n_steps: int = _option(50, "measure the held-out loss every so many steps")


_FIELDS = {field.name: field for field in dataclasses.fields(Options)}

# How a file gives an option. For each type of default: what an error message calls it, and the types that the TOML
# parser makes of it.
_IN_FILES: dict[type, tuple[str, tuple[type, ...]]] = {
    str: ("text", (str,)),
    int: ("a whole number", (int,)),
    float: ("a number", (float, int)),
    bool: ("true or false", (bool,)),
    tuple: ("a list of texts", (list,)),
}


@dataclass(frozen=True)
class Run:
    """A training run with all its options resolved.

    Attributes:
        options: the trainer's own options.
        optimizer_config: the options of the optimizer if it is one of this project's, else None.
    """

    options: Options
    optimizer_config: OptimizerConfig | None


def is_embedded(arguments: Sequence[str]) -> bool:
    """Whether the command line, or the TOML file that it names, asks for the embedded trainer.

    Raises:
        UserError: the file cannot be read.
    """
    # Not `_parser`: options of sd-scripts that have the same names may take values that it refuses.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--output_config", action="store_true")
    parser.add_argument("--config_file")
    known, _ = parser.parse_known_args(arguments)
    if known.embedded or known.config_file is None or known.output_config:
        return known.embedded
    return flattened(read_toml(config_path(known.config_file))).get("embedded") is True


def parse(arguments: Sequence[str]) -> Run:
    """Read the command line and the TOML file it names; the command line wins.

    Raises:
        UserError: an option is wrong; the message has the option, the file and what is allowed.
    """
    known, unknown = _parser().parse_known_args(arguments)
    if unknown:
        raise UserError(_about_unknown(unknown))
    given = vars(known)
    given.pop("embedded", None)
    path = given.pop("config_file", None)
    from_file: dict[str, Any] = {}
    table: dict[str, Any] = {}
    if path is not None:
        path = config_path(path)
        document = read_toml(path)
        refuse_keys_of_the_trainer(document.get("optimizer_config"), _FIELDS, path)
        refuse_repeated_keys(document, path)
        table = document.pop("optimizer_config", {})
        from_file = flattened(document)
        from_file.pop("embedded", None)
        for name, value in from_file.items():
            _check_file_option(path, name, value)
    values = {name: _normalized(name, value) for name, value in {**from_file, **given}.items()}
    options = Options(**values)
    _check_ranges(options)
    return Run(options, _optimizer_config(options, table, path or "the command line"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_network_patch.py --embedded",
        description="Train a LoRA of a small diffusion model on handwritten digits.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--embedded", action="store_true", help="use the embedded trainer instead of sd-scripts")
    parser.add_argument("--config_file", help="TOML file with these options, and a table [optimizer_config]")
    for field in _FIELDS.values():
        text, choices = field.metadata["help"], field.metadata.get("choices")
        flag = f"--{field.name}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        elif isinstance(field.default, tuple):
            parser.add_argument(flag, nargs="*", help=text)
        else:
            parser.add_argument(flag, type=type(field.default), choices=choices, help=f"{text} ({field.default})")
    return parser


def _about_unknown(words: Sequence[str]) -> str:
    """The message about words that no option takes. It never has a value, which may be a token meant for sd-scripts."""
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not names:
        return f"{len(words)} words of the command line belong to no option"
    nearest = nearest_name(names[0], [f"--{name}" for name in _FIELDS])
    return f"unknown option '{names[0]}'{nearest or '; --help lists those of the embedded trainer'}"


def _check_file_option(path: str, name: str, value: Any) -> None:
    if name in OPTION_NAMES:
        raise UserError(f"{path}: '{name}' does nothing outside of the table [optimizer_config]")
    if name not in _FIELDS:
        raise UserError(f"{path}: unknown key '{name}'{nearest_name(name, _FIELDS)}")
    default: Any = _FIELDS[name].default
    kind, allowed = _IN_FILES[type(default)]
    if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise UserError(f"{path}: key '{name}' is {value!r}; allowed: {kind}")
    choices = _FIELDS[name].metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{path}: key '{name}' is {value!r}; allowed: {', '.join(choices)}")
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}: key '{name}' is {value!r}; allowed: a list of texts")


def _normalized(name: str, value: Any) -> Any:
    default: Any = _FIELDS[name].default
    return tuple(value) if isinstance(default, tuple) else type(default)(value)


_AT_LEAST_ONE = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "network_dim")
_AT_LEAST_ZERO = ("lr_warmup_steps", "save_every_n_steps", "validate_every_n_steps", "max_grad_norm", "seed")


def _check_ranges(options: Options) -> None:
    for names, lowest in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            if not getattr(options, name) >= lowest:
                raise UserError(
                    f"option '{name}' is {getattr(options, name)!r}; allowed: a number of at least {lowest}"
                )
    for name in ("network_alpha", "learning_rate"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"option '{name}' is {getattr(options, name)!r}; allowed: a finite number above 0")
    if options.seed >= 2**32:
        raise UserError(f"option 'seed' is {options.seed!r}; allowed: a number below {2**32}")
    if re.search(r"[/\\:\x00-\x1f]|^\.*$", options.output_name):
        raise UserError(f"option 'output_name' is {options.output_name!r}; allowed: a file name without a folder")
    if options.resume and find_folder(Path(options.resume)) is None:
        others = sorted(path.name for path in Path(options.resume).parent.glob("*-state") if path.is_dir())
        beside = f"; beside it: {', '.join(others)}" if others else ""
        raise UserError(f"option 'resume' is {options.resume!r}, which is not a folder{beside}")


def _optimizer_config(options: Options, table: Any, source: str) -> OptimizerConfig | None:
    if not isinstance(table, dict):
        raise UserError(f"{source}: [optimizer_config] is {table!r}; allowed: a table")
    own = optimizer_name(options.optimizer_type) is not None
    if table and not own:
        raise UserError(
            f"{source}: [optimizer_config] is for {', '.join(OWN_OPTIMIZERS)}, not {options.optimizer_type}"
        )
    try:
        arguments = parse_optimizer_args(options.optimizer_args)
        if not own:
            return None
        return OptimizerConfig.from_toml(table, source, arguments, lr=options.learning_rate)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None

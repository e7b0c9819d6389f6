"""Reads the optimizer and its options from those of sd-scripts, and refuses what cannot go together."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from .. import PUBLIC_MODULE
from ..command_line import UserError, flattened, optimizer_name
from ..config import OPTION_NAMES, OptimizerConfig
from ..options import parse_optimizer_args


def resolve(args: argparse.Namespace, table: Any = None, source: str = "the command line") -> OptimizerConfig | None:
    """Check the options of a run with one of these optimizers, and write them as sd-scripts will resolve them.

    Afterwards `args.optimizer_type` is the dotted path that sd-scripts imports, and `args.optimizer_args` holds all
    options, so that sd-scripts builds, logs and saves them like those of any other optimizer. Doing it twice changes
    nothing.

    Args:
        args: sd-scripts' options, complete.
        table: `[optimizer_config]` of the TOML file; `args.optimizer_args` wins over it.
        source: the TOML file, for messages.

    Returns:
        The resolved configuration, or None for an optimizer of another family; then nothing has changed.

    Raises:
        UserError: a mistake, or an option of sd-scripts that these optimizers cannot serve.
    """
    name = optimizer_name(args.optimizer_type or "")
    if name is None:
        return None
    _refuse_what_does_not_fit(args, name)
    table = table or {}
    if not isinstance(table, dict):
        raise UserError(f"{source}: [optimizer_config] is {table!r}; allowed: a table")
    words = args.optimizer_args or []
    if isinstance(words, str):  # From a file; a list of its letters to the host.
        raise UserError(f'{source}: optimizer_args is "{words}"; allowed: a list, ["{words}"]')
    try:
        arguments = parse_optimizer_args(words)
        if _is_full_finetuning(args) and "full_finetune" not in table:
            arguments.setdefault("full_finetune", True)
        config = OptimizerConfig.from_toml(table, source, arguments, lr=args.learning_rate)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    args.optimizer_type = f"{PUBLIC_MODULE}.{name}"
    args.optimizer_args = [f"{key}={value!r}" for key, value in {**table, **arguments}.items()]
    return config


def refuse_what_the_host_drops(document: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Refuse options of the optimizer in places from which sd-scripts reads them and never uses them.

    Args:
        document: the TOML file.
        known: sd-scripts' own options.
        source: the TOML file's path.

    Raises:
        UserError: with the first such key or table.
    """
    for name, value in document.items():
        misnamed = name == "optimizer_args" or get_close_matches(name, ["optimizer_config"], cutoff=0.8)
        if isinstance(value, dict) and name != "optimizer_config" and misnamed:
            raise UserError(f"{source}: [{name}] does nothing; the optimizer's options stand in [optimizer_config]")
    for key in flattened(document):
        if key in OPTION_NAMES and key not in known:
            raise UserError(f"{source}: '{key}' does nothing outside of the table [optimizer_config]")


def as_toml(config: OptimizerConfig) -> str:
    """The configuration as TOML from which it would be read."""
    import toml

    options = {key: list(value) if isinstance(value, tuple) else value for key, value in config.as_dict().items()}
    lr = options.pop("lr")
    table: str = toml.dumps({"optimizer_config": options})
    return f"learning_rate = {lr!r}  # of groups without their own\n\n{table}"


def _is_full_finetuning(args: argparse.Namespace) -> bool:
    """Scripts that train a network beside the model have the option; the others train the model itself."""
    return not hasattr(args, "network_module")


def _refuse_what_does_not_fit(args: argparse.Namespace, name: str) -> None:
    if getattr(args, "deepspeed", False):
        raise UserError(f"--deepspeed flattens parameters, and {name} needs their shapes; train without it")
    if (args.lr_scheduler or "").startswith("adafactor"):
        raise UserError(
            f"--lr_scheduler {args.lr_scheduler} works with the optimizer Adafactor only, not with {name}; "
            "choose another, such as constant or cosine"
        )
    if getattr(args, "fused_backward_pass", False):
        raise UserError(
            f"--fused_backward_pass works with the optimizer Adafactor only, not with {name}; "
            "use --fused_optimizer_groups or --blockwise_fused_optimizers where the script has them"
        )
    if name.endswith("8bit"):
        from ..storage.blockwise import require_bitsandbytes

        try:
            require_bitsandbytes()
        except RuntimeError as error:
            raise UserError(str(error)) from None

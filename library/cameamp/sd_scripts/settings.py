"""Reads the optimizer and its options from those of sd-scripts, and refuses what cannot go together."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from .. import PUBLIC_MODULE
from ..command_line import UserError, misspelt_name, optimizer_name
from ..config import OptimizerConfig
from ..options import parse_optimizer_args
from . import in_backward
from .rates import check_rates, starting_rate

logger = logging.getLogger(__name__)


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
        meant = misspelt_name(args.optimizer_type or "")
        if meant is not None:
            raise UserError(f"--optimizer_type is {args.optimizer_type!r}, did you mean {meant!r}?")
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
        lowest = {**table, **arguments}.get("min_lr", OptimizerConfig.min_lr)
        config = OptimizerConfig.from_toml(table, source, arguments, lr=starting_rate(args, lowest))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    check_rates(args, config)
    args.optimizer_type = f"{PUBLIC_MODULE}.{name}"
    args.optimizer_args = [f"{key}={value!r}" for key, value in {**table, **arguments}.items()]
    return config


def warn_of_miscounted_steps(args: argparse.Namespace) -> None:
    """Warn if sd-scripts will count the steps that it skips once for every accumulated batch, as version 0.10.1 does.

    Args:
        args: sd-scripts' options, complete.
    """
    # Only the scripts that train a network have all of these options.
    given = vars(args)
    batches = given.get("gradient_accumulation_steps") or 1
    begins_later = any(given.get(name) for name in ("resume", "initial_step", "initial_epoch"))
    if batches > 1 and given.get("skip_until_initial_step") and begins_later:
        logger.warning(
            "--skip_until_initial_step with --gradient_accumulation_steps %d makes sd-scripts count %d times the steps "
            "already made, and train too little or nothing; instead of it write --initial_step 0 and the number of "
            "steps still to make as --max_train_steps",
            batches,
            batches,
        )


def as_toml(config: OptimizerConfig, learning_rate: float) -> str:
    """The configuration as TOML from which it would be read.

    Args:
        config: the configuration.
        learning_rate: sd-scripts' own option.
    """
    import toml

    options = {key: list(value) if isinstance(value, tuple) else value for key, value in config.as_dict().items()}
    del options["lr"]
    table: str = toml.dumps({"optimizer_config": options})
    return f"learning_rate = {learning_rate!r}  # of groups without their own\n\n{table}"


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
    in_backward.refuse_what_does_not_fit(args)
    if name.endswith("8bit"):
        from ..storage.blockwise import require_bitsandbytes

        try:
            require_bitsandbytes()
        except RuntimeError as error:
            raise UserError(str(error)) from None

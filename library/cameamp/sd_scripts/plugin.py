"""Wraps three functions of sd-scripts: those that read options, prepare accelerate and build optimizers.

All training scripts of sd-scripts call them in `library.train_util`, and look them up there at each call.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from tqdm import tqdm

from .. import report_loss
from ..command_line import OWN_OPTIMIZERS, UserError, config_path, optimizer_name, read_toml
from ..optimizer import CameAMP
from .document import check_places
from .in_backward import InBackward, without_it
from .monitor import Monitor
from .rates import given_rates
from .resuming import Resume
from .schedule import PlannedEnd
from .settings import as_toml, resolve, warn_of_miscounted_steps

logger = logging.getLogger(__name__)


class Plugin:
    """Serves the optimizers of this family in an sd-scripts run; every other optimizer is left as it is.

    Args:
        print_config: print the resolved configuration instead of training.
        new_rate: resume at the learning rate that the options say, not at the state's.
    """

    def __init__(self, print_config: bool = False, new_rate: bool = False) -> None:
        self._print_config = print_config
        self._new_rate = new_rate
        self._optimizers: list[CameAMP] = []
        self._names: dict[Tensor, str] = {}
        self._monitor = Monitor(self._optimizers)
        self._in_backward = InBackward(self._optimizers)

    def install(self, train_util: ModuleType) -> None:
        """Wrap the three functions of sd-scripts' `library.train_util`, the progress bar, and what hooks call."""
        for name, wrapper in (
            ("read_config_from_file", self._reading_config),
            ("prepare_accelerator", self._preparing_accelerator),
            ("get_optimizer", self._getting_optimizer),
        ):
            original = getattr(train_util, name)
            setattr(train_util, name, wraps(original)(wrapper(original)))
        self._monitor.add_to_progress_bars(tqdm)
        self._in_backward.install()

    # Options ----------------------------------------------------------------------------------------------------

    def _reading_config(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
            path = config_path(args.config_file) if args.config_file else None
            writes = getattr(args, "output_config", False)  # The host writes the file and exits.
            document = read_toml(path, marked=False) if path and not writes else {}
            args = original(args, parser)
            table = document.get("optimizer_config")
            if path and optimizer_name(args.optimizer_type or "") is not None:
                check_places(document, {action.dest for action in parser._actions}, path)
            config = resolve(args, table, path or "the command line")
            if config is None:
                self._serve_another(args, path, table)
                return args
            warn_of_miscounted_steps(args)
            if self._print_config:
                print(as_toml(config, args.learning_rate))
                raise SystemExit(0)
            return args

        return read_config_from_file

    def _serve_another(self, args: argparse.Namespace, path: str | None, table: Any) -> None:
        """Let another optimizer train, but not with options that are for this family alone."""
        name = args.optimizer_type or "AdamW"
        for option, is_set in (
            ("print_optimizer_config", self._print_config),
            ("new_learning_rate_on_resume", self._new_rate),
        ):
            if is_set:
                raise UserError(f"--{option} is for {', '.join(OWN_OPTIMIZERS)}; the optimizer is {name}")
        if table:
            logger.warning("%s: [optimizer_config] is not for %s, and is ignored", path, name)

    def _getting_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_optimizer(args: argparse.Namespace, trainable_params: Any) -> Any:
            config = resolve(args)
            if config is None:
                return original(args, trainable_params)
            if isinstance(trainable_params, list) and not trainable_params:
                raise UserError(f"there is nothing to train: {given_rates(args)}; what trains needs a rate above 0")
            if args.learning_rate == 0:  # It is for what has no rate of its own, and none for a whole optimizer.
                trainable_params = [{"lr": 0.0, **group} for group in trainable_params]
                args = argparse.Namespace(**{**vars(args), "learning_rate": config.lr})
            try:
                name, options, optimizer = original(without_it(args), trainable_params)
            except (TypeError, ValueError) as error:
                raise UserError(str(error)) from error
            self._optimizers.append(optimizer)
            return name, options, optimizer

        return get_optimizer

    # The training loop ------------------------------------------------------------------------------------------

    def _preparing_accelerator(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_accelerator(args: argparse.Namespace) -> Any:
            accelerator = original(args)
            self._optimizers.clear()
            self._names.clear()
            self._monitor.restart()
            self._in_backward.begin(args, accelerator)
            resume = Resume(self._optimizers, self._new_rate)
            accelerator.load_state = resume.loading(accelerator, accelerator.load_state)
            accelerator.prepare = self._preparing(accelerator, accelerator.prepare, resume)
            if accelerator.distributed_type == DistributedType.MULTI_CPU:
                accelerator.prepare_model = _leaving_frozen_models(accelerator.prepare_model)
            planned_end = PlannedEnd(self._optimizers, args, accelerator)
            accelerator.backward = self._going_backward(accelerator, accelerator.backward, planned_end)
            accelerator.init_trackers = self._starting_trackers(accelerator, accelerator.init_trackers)
            return accelerator

        return prepare_accelerator

    def _preparing(self, accelerator: Any, prepare: Callable[..., Any], resume: Resume) -> Callable[..., Any]:
        """Give the optimizers the names of the parameters of every model, and load what is prepared after a resume."""

        @wraps(prepare)
        def prepare_and_name(*objects: Any, **options: Any) -> Any:
            models = [item for item in objects if isinstance(item, torch.nn.Module)]
            for model in models:
                self._names.update((p, name) for name, p in model.named_parameters())
            for optimizer in self._optimizers if models else ():
                optimizer.set_parameter_names(self._names)
            prepared = prepare(*objects, **options)
            resume.load_what_is_new(accelerator)
            return prepared

        return prepare_and_name

    def _going_backward(
        self, accelerator: Any, backward: Callable[..., Any], planned_end: PlannedEnd
    ) -> Callable[..., Any]:
        """Report the loss before the backward pass, during which some optimizers already step."""

        @wraps(backward)
        def report_and_go_backward(loss: Tensor, **options: Any) -> Any:
            for optimizer in self._optimizers:
                report_loss(optimizer, loss)
            if accelerator.sync_gradients:
                planned_end.step_begins()
                self._monitor.step_ends()
            result = backward(loss, **options)
            if accelerator.sync_gradients:
                self._in_backward.step_ends()
            return result

        return report_and_go_backward

    def _starting_trackers(self, accelerator: Any, init_trackers: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(init_trackers)
        def init_and_add(*arguments: Any, **options: Any) -> Any:
            result = init_trackers(*arguments, **options)
            for tracker in accelerator.trackers:
                self._monitor.add_to_tracker(tracker)
            return result

        return init_and_add


def _leaving_frozen_models(prepare_model: Callable[..., Any]) -> Callable[..., Any]:
    """Let several CPU processes train a network beside a frozen model.

    DistributedDataParallel refuses a model without trainable parameters. On GPUs accelerate leaves such a model
    unwrapped, on CPUs it does not.
    """

    @wraps(prepare_model)
    def prepare_unless_frozen(model: torch.nn.Module, *more: Any, **options: Any) -> Any:
        if not any(p.requires_grad for p in model.parameters()):
            options["evaluation_mode"] = True
        return prepare_model(model, *more, **options)

    return prepare_unless_frozen

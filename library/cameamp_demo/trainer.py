"""The training run: a loop on accelerate like that of sd-scripts, with a small model."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import library.automagic_cameamp as family

from ..cameamp.command_line import OWN_OPTIMIZERS, UserError, optimizer_name
from ..cameamp.optimizer import CameAMP
from ..cameamp.options import parse_optimizer_args
from ..cameamp.readings import Readings, named, read
from . import files
from .data import NEW_DIGITS, NoisyBatch, held_out_batches, load, training_batch
from .model import TIMESTEPS, load_base
from .network import LoRANetwork
from .options import Run
from .pictures import History, sample_digits, save_course, save_samples

logger = logging.getLogger(__name__)

_HELD_OUT_REPEATS = 4
_PROGRESS_FILE = "progress.json"


class Trainer:
    """One training run, from loading the model to writing the last file.

    Args:
        run: resolved options.

    Raises:
        UserError: the output folder cannot be written, or an option does not fit.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.options = run.options
        self.output = Path(self.options.output_dir)
        if optimizer_name(self.options.optimizer_type) is None:
            _torch_optimizer(self.options.optimizer_type)
        logs = Path(self.options.logging_dir) if self.options.logging_dir else self.output / "logs"
        for folder in (self.output, logs):
            _require_writable(folder)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=self.options.gradient_accumulation_steps,
            mixed_precision=self.options.mixed_precision,
            log_with="tensorboard",
            project_dir=str(logs),
        )
        set_seed(self.options.seed)
        self.base = load_base().to(self.accelerator.device)
        self.lora = LoRANetwork(self.base, self.options.network_dim, self.options.network_alpha)
        optimizer = self._new_optimizer()
        try:
            scheduler = get_scheduler(
                self.options.lr_scheduler,
                optimizer,
                num_warmup_steps=self.options.lr_warmup_steps * self.accelerator.num_processes,
                num_training_steps=self.options.max_train_steps * self.accelerator.num_processes,
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"option 'lr_scheduler' is {self.options.lr_scheduler!r}: {error}") from None
        self.network, self.optimizer, self.scheduler = self.accelerator.prepare(self.lora, optimizer, scheduler)
        self.history = History()
        self.step = 0
        self.data = load(NEW_DIGITS, held_out=False)
        held_out = held_out_batches(load(NEW_DIGITS, held_out=True), TIMESTEPS, _HELD_OUT_REPEATS)
        self.held_out = [self._on_device(batch) for batch in held_out]

    def train(self) -> tuple[float, float] | None:
        """Train, and write the LoRA, its pictures and, if asked for, its state.

        Returns:
            The held-out loss before and after. None if the user interrupted the run; its state has been saved then.
        """
        options = self.options
        self._unshard()
        samples_before = sample_digits(self.base, self.accelerator.device)
        if options.resume:
            self._load_state(Path(options.resume))
        self.accelerator.init_trackers(options.output_name)
        if not self.history.held_out:
            self.history.held_out.append((0, self.held_out_loss()))
        progress = tqdm(
            total=options.max_train_steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        with _interruptible() as interrupted, progress:
            while self.step < options.max_train_steps:
                loss = self._train_step()
                readings = self._read_optimizer()
                self._record(loss, readings)
                progress.set_postfix(loss=f"{loss:.4f}", lr=f"{readings.learning_rates[0][0]:.2e}")
                progress.update()
                last = self.step == options.max_train_steps
                every = options.save_every_n_steps
                if every and self.step % every == 0 and not last:
                    self._save(f"-step{self.step:08d}")
                if not last and self._stops(interrupted):
                    folder = self._save_state(f"-step{self.step:08d}")
                    print(f"\ninterrupted after step {self.step}; to continue: the same command with --resume {folder}")
                    self.accelerator.end_training()
                    return None
        if self.history.held_out[-1][0] != self.step:
            self.history.held_out.append((self.step, self.held_out_loss()))
        self._save("")
        self._unshard()
        if self.accelerator.is_main_process:
            samples = sample_digits(self.base, self.accelerator.device)
            title = f"{options.optimizer_type}, lr {options.learning_rate:g}"
            pictures = [self.output / f"{options.output_name}-{name}.png" for name in ("samples", "course")]
            with _saving(pictures[0]):
                save_samples(samples_before, samples, pictures[0])
            with _saving(pictures[1]):
                save_course(self.history, title, pictures[1])
        self.accelerator.end_training()
        return self.history.held_out[0][1], self.history.held_out[-1][1]

    def _stops(self, interrupted: list[Any]) -> bool:
        """Whether the run stops here: if any process was interrupted, or some would wait for others that save."""
        flag = torch.tensor(float(len(interrupted)), device=self.accelerator.device)
        return self.accelerator.reduce(flag).item() > 0

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss on the held-out images of the new digits, with the same noise at every call."""
        return torch.stack([self.network(batch) for batch in self.held_out]).mean().item()

    # One step ---------------------------------------------------------------------------------------------------

    def _train_step(self) -> float:
        accumulation = self.options.gradient_accumulation_steps
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(accumulation):
            batch = self._batch(self.step * accumulation + part)
            with self.accelerator.accumulate(self.network):
                loss = self.network(batch)
                total += loss.detach() / accumulation
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.options.max_grad_norm > 0:
                    self.accelerator.clip_grad_norm_(self.network.parameters(), self.options.max_grad_norm)
                family.report_loss(self.optimizer, loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return self.accelerator.reduce(total, "mean").item()

    def _batch(self, number: int) -> NoisyBatch:
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        number = number * ranks + rank
        options = self.options
        return self._on_device(training_batch(self.data, options.train_batch_size, TIMESTEPS, options.seed, number))

    def _on_device(self, batch: NoisyBatch) -> NoisyBatch:
        return NoisyBatch(*(tensor.to(self.accelerator.device) for tensor in batch))

    def _read_optimizer(self) -> Readings:
        optimizer = self.optimizer.optimizer
        if isinstance(optimizer, CameAMP):
            return read([optimizer])[0]
        return Readings([(group["lr"],) * 3 for group in optimizer.param_groups], {})

    def _record(self, loss: float, readings: Readings) -> None:
        self.history.loss.append(loss)
        self.history.learning_rates.append(readings.learning_rates)
        if readings.context:
            self.history.context.append(readings.context)
        values = {"loss": loss, **named([readings])}
        every = self.options.validate_every_n_steps
        if every and self.step % every == 0:
            held_out = self.held_out_loss()
            self.history.held_out.append((self.step, held_out))
            values["loss/held_out"] = held_out
        self.accelerator.log(values, step=self.step)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        groups = self.lora.parameter_groups()
        own = optimizer_name(self.options.optimizer_type)
        if own is not None:
            try:
                optimizer = getattr(family, own)(groups, config=self.run.optimizer_config)
            except RuntimeError as error:  # No bitsandbytes for 8-bit states.
                raise UserError(str(error)) from None
            optimizer.set_parameter_names({p: name for name, p in self.lora.named_parameters()})
            return optimizer
        other = _torch_optimizer(self.options.optimizer_type)
        try:
            return other(groups, lr=self.options.learning_rate, **parse_optimizer_args(self.options.optimizer_args))
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer_args: {error}") from None

    def _unshard(self) -> None:
        """Under FSDP2, have all of the LoRA on every process, for what uses it outside of a training step."""
        if hasattr(self.network, "unshard"):
            self.network.unshard()

    # Files ------------------------------------------------------------------------------------------------------

    def _save(self, suffix: str) -> None:
        tensors = {name: _whole(value).cpu().contiguous() for name, value in self.lora.state_dict().items()}
        if self.accelerator.is_main_process:
            path = self.output / f"{self.options.output_name}{suffix}.safetensors"
            with _saving(path):
                self._save_lora(tensors, path)
        if self.options.save_state:
            self._save_state(suffix)

    def _save_lora(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, str(files.beside(path)), metadata=self._metadata())
        files.take_place_of_file(path)

    def _metadata(self) -> dict[str, str]:
        options = self.options
        optimizer = self.optimizer.optimizer
        name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        config = self.run.optimizer_config
        arguments = "" if config is None else ",".join(f"{key}={value}" for key, value in config.as_dict().items())
        facts = {
            "ss_optimizer": f"{name}({arguments})" if arguments else name,
            "ss_network_module": "networks.lora",
            "ss_network_dim": options.network_dim,
            "ss_network_alpha": options.network_alpha,
            "ss_learning_rate": options.learning_rate,
            "ss_lr_scheduler": options.lr_scheduler,
            "ss_lr_warmup_steps": options.lr_warmup_steps,
            "ss_steps": self.step,
            "ss_max_train_steps": options.max_train_steps,
            "ss_gradient_accumulation_steps": options.gradient_accumulation_steps,
            "ss_max_grad_norm": options.max_grad_norm,
            "ss_mixed_precision": options.mixed_precision,
            "ss_seed": options.seed,
            "ss_output_name": options.output_name,
        }
        return {key: str(value) for key, value in facts.items()}

    def _save_state(self, suffix: str) -> Path:
        """Save what resuming needs. If saving fails or is killed, the state saved before is still there."""
        folder = self.output / f"{self.options.output_name}{suffix}-state"
        with _saving(folder):
            if self.accelerator.is_main_process:
                files.begin_folder(folder)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(files.beside(folder)))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                progress = json.dumps({"step": self.step, "history": vars(self.history)})
                (files.beside(folder) / _PROGRESS_FILE).write_text(progress, encoding="utf-8")
                files.take_place_of_folder(folder)
            self.accelerator.wait_for_everyone()
        return folder

    def _load_state(self, wanted: Path) -> None:
        folder = files.find_folder(wanted) or wanted
        try:
            files.check_folder(folder)
            progress = json.loads((folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
            step, history = progress["step"], History(**progress["history"])
            asked = [entry["initial_lr"] for entry in self.optimizer.param_groups]
            self.accelerator.load_state(str(folder))
            resumed = [entry["initial_lr"] for entry in self.optimizer.param_groups]
        except Exception as error:  # A damaged file can make the readers raise anything.
            raise UserError(f"cannot resume from {folder}: {_one_line(error)}") from None
        if step >= self.options.max_train_steps:
            raise UserError(
                f"cannot resume from {folder}: it has {step} steps already, and max_train_steps is "
                f"{self.options.max_train_steps}"
            )
        if resumed != asked:
            logger.warning(
                "--resume: the run goes on at the state's learning rate, %g, and not at %g",
                resumed[0],
                asked[0],
            )
        self.step, self.history = step, history


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which this process may hold a shard; then every process has to ask for it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    """Turn any error of a writer, such as a full disk, into one line, and delete the incomplete file."""
    try:
        yield
    except Exception as error:  # The writers of torch and safetensors have many kinds of errors.
        partial = files.beside(path)
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UserError(
            f"cannot save {path}: {_one_line(error)} ({free:.0f} MiB free on that disk); "
            "what was saved before is still there"
        ) from None


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


_ALLOWED_OPTIMIZERS = f"{', '.join(OWN_OPTIMIZERS)} or a class of torch.optim whose step needs no closure"


def _torch_optimizer(name: str) -> Any:
    found = getattr(torch.optim, name, None)
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer) or _wants_closure(found):
        raise UserError(f"option 'optimizer_type' is {name!r}; allowed: {_ALLOWED_OPTIMIZERS}")
    return found


def _wants_closure(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    """Whether a step evaluates the model itself, as with LBFGS. This trainer evaluates it only before a step."""
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror or error}") from None


@contextmanager
def _interruptible() -> Iterator[list[Any]]:
    """Yield a list that a first Ctrl-C is put into, so that the current step is finished; a second one interrupts."""
    received: list[Any] = []

    def remember(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)

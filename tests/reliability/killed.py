"""A process is killed while a sharded run saves its state: the state saved before is whole, and can be resumed from."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from library.cameamp_demo import files
from library.cameamp_demo.pictures import History
from library.cameamp_demo.trainer import Trainer

from .accelerated import prepared
from .processes import in_processes
from .resharded import everything, train

OPTIMIZER = "Automagic_CameAMP_COptim8bit"
STEPS = 3

# When the last process dies: as it begins to write its part of the model or of the states, or in the middle of either.
PLACES = ("model begun", "model half done", "states begun", "states half done")
_FOLDERS = {"model": "pytorch_model_fsdp_0", "states": "optimizer_0"}


def kill(folder: Path, place: str, processes: int = 2) -> dict[str, Any]:
    """Train and save, and go on and save again, which one process does not survive.

    Args:
        folder: an empty one.
        place: one of `PLACES`.
        processes: how many train, of which the last one dies.

    Returns:
        What there was when it was saved, by name.
    """
    try:
        in_processes(processes, _save_twice, str(folder), place)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.error_index != processes - 1 or error.signal_name not in ("SIGKILL", "SIGXFSZ"):
            raise
    else:
        raise AssertionError(f"no process was killed at '{place}'")
    saved: dict[str, Any] = torch.load(folder / "before.pt", weights_only=True)
    return saved


def left(rank: int, folder: str) -> dict[str, Any]:
    """Resume from what is left. Returns what there is then, by name."""
    found = files.find_folder(Path(folder) / "run-state")
    assert found is not None, "no state is left"
    files.check_folder(found)
    accelerator, model, optimizer = prepared("SHARDED_STATE_DICT", OPTIMIZER)
    accelerator.load_state(str(found))
    return everything(model, optimizer.optimizer)


def _save_twice(rank: int, folder: str, place: str) -> None:
    accelerator, model, optimizer = prepared("SHARDED_STATE_DICT", OPTIMIZER)
    for first in (0, STEPS):
        train(model, optimizer.optimizer, first, first + STEPS)
        before = everything(model, optimizer.optimizer)
        if first == 0 and rank == 0:
            torch.save(before, Path(folder) / "before.pt")
        if first > 0 and rank == dist.get_world_size() - 1:
            _die_at(place)
        _save(accelerator, Path(folder), first + STEPS)


def _save(accelerator: Any, folder: Path, step: int) -> None:
    """Save as the trainer does."""
    options = SimpleNamespace(output_name="run")
    trainer: Any = SimpleNamespace(
        output=folder, options=options, accelerator=accelerator, step=step, history=History()
    )
    Trainer._save_state(trainer, "")


def _die_at(place: str) -> None:
    """Have this process killed at a place of its next save: by itself, or by the system that lets it write no more."""
    import resource  # Windows has no such module.

    what, _, when = place.partition(" ")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or Path(str(arguments[0])).parent.name != _FOLDERS[what]:
            return
        if when == "begun":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    sys.addaudithook(watch)

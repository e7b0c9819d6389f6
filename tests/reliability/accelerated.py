"""accelerate's save_state and load_state under FSDP2, with sharded and with full state dicts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

import library.automagic_cameamp as family
from library.cameamp_demo.trainer import Trainer

from .fsdp_on_cpu import sharding
from .resharded import everything, model_of, train

CASES = [
    (kind, name, steps)
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
    for name in ("Automagic_CameAMP", "Automagic_CameAMP_COptim8bit")
    for steps in (2, 6)
]
MORE = 2


def saved(rank: int, folder: str) -> list[dict[str, Any]]:
    """Train, save, and train on. Returns for each case what there was at the end."""
    found = []
    for kind, name, steps in CASES:
        accelerator, model, optimizer = prepared(kind, name)
        train(model, optimizer.optimizer, 0, steps)
        accelerator.save_state(str(Path(folder) / f"{kind} {name} {steps}"))
        train(model, optimizer.optimizer, steps, steps + MORE)
        found.append(everything(model, optimizer.optimizer))
    return found


def loaded(rank: int, folder: str) -> list[dict[str, Any]]:
    """Load what `saved` saved, and train on. Returns for each case what there was at the end."""
    found = []
    for kind, name, steps in CASES:
        accelerator, model, optimizer = prepared(kind, name)
        accelerator.load_state(str(Path(folder) / f"{kind} {name} {steps}"))
        train(model, optimizer.optimizer, steps, steps + MORE)
        found.append(everything(model, optimizer.optimizer))
    return found


def prepared(kind: str, name: str) -> tuple[Accelerator, nn.Module, Any]:
    """accelerate with a new model, and with an optimizer that was built before the model was sharded."""
    for variable, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size())):
        os.environ[variable] = os.environ[f"LOCAL_{variable}"] = str(value)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", "29500"
    accelerator = sharding(Accelerator(cpu=True), kind)
    model = model_of().double()  # Gradients of float64, as everywhere in these tests.
    optimizer = getattr(family, name)(model.parameters(), lr=1e-4, warmup_steps=4)
    return accelerator, *accelerator.prepare(model, optimizer)


def stops(rank: int) -> list[bool]:
    """Whether the trainer stops if nobody is interrupted, and if the last process is."""
    trainer: Any = SimpleNamespace(accelerator=prepared(CASES[0][0], CASES[0][1])[0])
    last = dist.get_world_size() - 1
    return [Trainer._stops(trainer, []), Trainer._stops(trainer, [2] if rank == last else [])]

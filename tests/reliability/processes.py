"""Processes of one gloo group on this machine."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What takes seconds to import, and starts no thread. On Linux a server that has done so forks each process; elsewhere
# what is imported may not be forked.
_IMPORTED = ["accelerate", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "bitsandbytes", "numba"]
_FORKS = sys.platform == "linux"


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(rank, *arguments)` in some processes of one group. Returns what each process returned."""
    if _FORKS:
        multiprocessing.set_forkserver_preload(_IMPORTED)
    method = "forkserver" if _FORKS else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (count, work, folder, arguments), nprocs=count, start_method=method
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


def all_of(rank: int, works: Sequence[tuple[Callable[..., Any], tuple]]) -> list[Any]:
    """Several pieces of work one after the other, because starting processes takes seconds."""
    return [work(rank, *arguments) for work, arguments in works]


def _process(rank: int, count: int, work: Callable[..., Any], folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    try:
        torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    # No teardown of the interpreter: a thread of the group, kept by a model that refers to it, aborts the process if it
    # asks for the interpreter's lock while Python ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

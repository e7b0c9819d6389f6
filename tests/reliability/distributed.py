"""Two processes over gloo: DDP keeps its replicas equal bit for bit; FSDP1's parameters are refused."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .processes import in_processes
from .runs import OPTIMIZERS, everything, from_bytes, to_bytes

PROCESSES = 2
_ACCUMULATION = 2


def ddp(steps: int) -> dict[str, list[str]]:
    """Train with DDP and gradients accumulated over two batches, and resume from the middle on every process.

    Returns:
        For each optimizer the digests of weights and states: one for each process after the uninterrupted run, then one
        for each process after the resumed run.
    """
    results = in_processes(PROCESSES, _ddp, steps)
    return {name: [r[name][0] for r in results] + [r[name][1] for r in results] for name in results[0]}


def flattened() -> list[dict[str, dict[str, str]]]:
    """Take a step with parameters that each kind of FSDP1 has flattened.

    Returns:
        For each process, kind and optimizer, the message of the RuntimeError; empty if there was none.
    """
    return in_processes(PROCESSES, _flattened)


def built_too_early() -> list[dict[str, dict[str, str]]]:
    """Take a step with an optimizer that was built before FSDP sharded its parameters.

    Returns:
        For each process, kind and optimizer, the message of the error or of the warning; empty if there was none.
    """
    return in_processes(PROCESSES, _built_too_early)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))


def _ddp(rank: int, steps: int) -> dict[str, list[str]]:
    results = {}
    for optimizer_class in OPTIMIZERS:
        model, optimizer = _replica(optimizer_class, steps)
        _train(model, optimizer, rank, 0, steps // 2)
        saved = to_bytes({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()})
        _train(model, optimizer, rank, steps // 2, steps)
        again, resumed = _replica(optimizer_class, steps)
        loaded = from_bytes(saved)
        again.module.load_state_dict(loaded["model"])
        resumed.load_state_dict(loaded["optimizer"])
        _train(again, resumed, rank, steps // 2, steps)
        results[optimizer_class.__name__] = [_digest(optimizer), _digest(resumed)]
    return results


def _replica(optimizer_class: type[Any], steps: int) -> tuple[DistributedDataParallel, Any]:
    model = DistributedDataParallel(_model())
    return model, optimizer_class(model.parameters(), lr=1e-4, warmup_steps=steps * 2 // 3)


def _train(model: DistributedDataParallel, optimizer: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last):
        for part in range(_ACCUMULATION):
            generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
            x = torch.randn(8, 64, generator=generator)
            if part < _ACCUMULATION - 1:
                with model.no_sync():
                    _loss(model, optimizer, x)
            else:
                _loss(model, optimizer, x)
        optimizer.step()
        optimizer.zero_grad()


def _loss(model: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
    loss = (model(x) - x.flip(1)).square().mean() / _ACCUMULATION
    loss.backward()
    if hasattr(optimizer, "report_loss"):
        optimizer.report_loss(loss.detach())


def _digest(optimizer: Any) -> str:
    found = everything(optimizer)
    states = [found[name] for name in sorted(found) if not name.startswith("group")]
    return hashlib.sha256(to_bytes(states)).hexdigest()


def _fully_sharded(model: nn.Module) -> nn.Module:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # torch up to 2.5.
        from torch.distributed._composable.fsdp import fully_shard
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (PROCESSES,)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # A build of torch 2.4 for GPUs can't run it without one.
    return model


def _fsdp(model: nn.Module, use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    model(torch.ones(8, 64)).square().mean().backward()
    return model


_FLATTENINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FullyShardedDataParallel": partial(_fsdp, use_orig_params=False),
    "FullyShardedDataParallel, use_orig_params": partial(_fsdp, use_orig_params=True),
}

_SHARDINGS = {"fully_shard": _fully_sharded, **_FLATTENINGS}


def _flattened(rank: int) -> dict[str, dict[str, str]]:
    messages: dict[str, dict[str, str]] = {}
    for kind, shard in _FLATTENINGS.items():
        for optimizer_class in OPTIMIZERS:
            model = shard(_model())
            optimizer = optimizer_class(model.parameters())
            before = [p.detach().clone() for p in model.parameters()]
            messages.setdefault(kind, {})[optimizer_class.__name__] = _complaint(optimizer)
            assert all(map(_equal, model.parameters(), before))
            assert len(optimizer.state) == 0
    return messages


def _built_too_early(rank: int) -> dict[str, dict[str, str]]:
    messages: dict[str, dict[str, str]] = {}
    for kind, shard in _SHARDINGS.items():
        for optimizer_class in OPTIMIZERS:
            model = _model()
            optimizer = optimizer_class(model.parameters())
            shard(model)
            messages.setdefault(kind, {})[optimizer_class.__name__] = _complaint(optimizer)
    return messages


def _complaint(optimizer: torch.optim.Optimizer) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "".join(str(warning.message) for warning in caught)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.to_local() if hasattr(x, "to_local") else x for x in (a, b))
    return torch.equal(a, b)

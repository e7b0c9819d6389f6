"""The costs of a step that need no clock: operations, read-backs, bytes of state, bytes of temporary memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from library.cameamp.optimizer import CameAMP
from library.cameamp.stacks.workspace import Workspace

# Operations that only make a view of a tensor or mark a place for the profiler. They launch no kernel.
_NO_KERNEL = {
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view",
}  # fmt: skip

# Operations that make the program wait for the device: the result, or its shape, is a value that the CPU needs.
_READ_BACK = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts the tensor operations that run inside it, used as a context manager.

    Attributes:
        counts: how often each operation that launches a kernel was run.
        read_backs: the names of the operations that read a value back from the device, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.read_backs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _READ_BACK or _selects_by_mask(name, args) or _copies_to_host(name, args, kwargs or {}):
            self.read_backs.append(name)
        if name not in _NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _selects_by_mask(name: str, args: Any) -> bool:
    """Whether elements are selected by a bool mask, so that the result's shape depends on the mask's values."""
    if not name.startswith("index"):
        return False
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _copies_to_host(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a tensor is copied from another device to the CPU."""
    if name != "_to_copy" or "device" not in kwargs:
        return False
    return torch.device(kwargs["device"]).type == "cpu" and args[0].device.type != "cpu"


def operations(step: Callable[[], Any]) -> Operations:
    """Take one step and count its operations."""
    with Operations() as counted:
        step()
    return counted


def temporary_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The largest amount of CPU memory that a step allocates beyond what was allocated before it.

    As `peak_bytes`. The working memory that the
    optimizers of this project reuse from step to step is dropped first, so that it counts too.
    """
    if isinstance(optimizer, CameAMP):
        optimizer._engine._workspace = Workspace()
    return peak_bytes(optimizer.step)


def peak_bytes(act: Callable[[], Any]) -> int:
    """The largest amount of CPU memory that something allocates beyond what was allocated before it.

    Torch's allocator is asked, and numpy's, so that memory inside kernels counts.
    """
    tracemalloc.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    _, of_numpy = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = highest = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest + of_numpy


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor reachable from `optimizer.state`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(dict(optimizer.state)))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []

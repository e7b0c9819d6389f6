"""Same-shape parameters as one stack, so that a rule is a handful of operations and not a handful per parameter.

`optimizer.state[p]` stays the only record of a parameter's states. What it holds are slices of a batch's buffers; a
batch is only a layout, checked against the state at every step. States that were loaded, replaced or left behind by
another batch are copied into new buffers, and nothing else has to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# At most this many elements side by side: the half dozen temporary stacks of the rules, 16 MiB each, stay well under
# 256 MiB.
LARGEST_STACK = 4 * 1024 * 1024
# Larger stacks launch fewer operations, smaller ones stay in a CPU's caches. About a dozen do well at both.
_STACKS = 12
_SMALLEST_STACK = 512 * 1024

State = MutableMapping[str, Any]


class Storage(Protocol):
    """How one state of a stack is kept; see `storage`."""

    def keys(self, name: str) -> tuple[str, ...]: ...

    def allocate(
        self, name: str, shape: torch.Size, n: int, fill: float, device: torch.device
    ) -> dict[str, Tensor]: ...

    def read(self, name: str, buffers: dict[str, Tensor], rows: int, columns: int) -> Tensor: ...

    def write(self, name: str, buffers: dict[str, Tensor], stack: Tensor) -> None: ...


class Traits(NamedTuple):
    """What the parameters of a batch have in common, beside shape, dtype and device.

    Attributes:
        step: how many steps they have taken, the one under way included.
        row_scaled: whether ALLoRA applies to them.
        has_polarity: whether they have a gradient sign from a step before.
    """

    step: int
    row_scaled: bool
    has_polarity: bool


class Batch:
    """Parameters of one group that share shape, dtype, device and traits.

    Attributes:
        params: the parameters.
        traits: what they have in common.
        rows, columns: their shape as matrices: the first dimension, and the others flattened.
    """

    def __init__(self, params: list[Tensor], positions: list[int], traits: Traits) -> None:
        self.params = params
        self.traits = traits
        shape = params[0].shape
        self.rows = shape[0] if len(shape) > 0 else 1
        self.columns = shape.numel() // self.rows
        self._positions = positions
        self._buffers: dict[str, Tensor] = {}
        self._slices: dict[str, tuple[Tensor, ...]] = {}
        self._positions_on_device: Tensor | None = None

    def __len__(self) -> int:
        return len(self.params)

    def numel(self) -> int:
        """Elements of the whole stack."""
        return len(self.params) * self.rows * self.columns

    def bind(self, state: Mapping[Tensor, State], storages: Mapping[str, Storage], fills: Mapping[str, float]) -> None:
        """Make the buffers hold the states that `storages` names, and no others.

        Args:
            state: the optimizer's state.
            storages: for each state name, how it is kept.
            fills: what an element starts at, where a parameter does not have the state yet; 0 if not named.
        """
        for name, storage in storages.items():
            if not all(self._holds(state, key) for key in storage.keys(name)):
                self._rebuild(state, name, storage, fills.get(name, 0.0))
        wanted = {key for name, storage in storages.items() for key in storage.keys(name)}
        for key in self._buffers.keys() - wanted:
            del self._buffers[key], self._slices[key]
        for p in self.params:
            if len(state[p]) > len(wanted) + 1:
                for key in state[p].keys() - wanted - {"step"}:
                    del state[p][key]

    def read(self, storages: Mapping[str, Storage]) -> dict[str, Tensor]:
        """The states as stacks of (tensors, rows, columns)."""
        return {name: kept.read(name, self._buffers, self.rows, self.columns) for name, kept in storages.items()}

    def write(self, storages: Mapping[str, Storage], stacks: Mapping[str, Tensor]) -> None:
        """Keep what the rules made of the stacks that `read` gave."""
        for name, storage in storages.items():
            storage.write(name, self._buffers, stacks[name])

    def gradients(self, out: Tensor | None = None) -> Tensor:
        """The gradients as float32, (tensors, rows, columns): a copy to write into, in `out` where given."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if len(grads) == 1:
            single = grads[0].reshape(1, self.rows, self.columns)
            return single.to(torch.float32, copy=True) if out is None else out.copy_(single)
        return self._stack(grads, out)

    def weights(self, out: Tensor | None = None) -> Tensor:
        """The parameters as float32, (tensors, rows, columns): a copy, but for a single contiguous float32 one."""
        if len(self.params) == 1:
            return self.params[0].reshape(1, self.rows, self.columns).float()
        return self._stack(self.params, out)

    def write_weights(self, stack: Tensor) -> None:
        """Write a stack of the parameters' own dtype back into them."""
        if stack.data_ptr() != self.params[0].data_ptr():
            torch._foreach_copy_(self.params, list(stack.view(-1, *self.params[0].shape).unbind()))

    def positions(self) -> Tensor:
        """The parameters' numbers in the optimizer, int32 (tensors,), on their device."""
        device = self.params[0].device
        if self._positions_on_device is None or self._positions_on_device.device != device:
            numbers = torch.tensor(self._positions, dtype=torch.int32)
            self._positions_on_device = numbers.to(device, non_blocking=True)
        return self._positions_on_device

    def _stack(self, tensors: list[Tensor], out: Tensor | None) -> Tensor:
        if out is not None and tensors[0].dtype == out.dtype:
            torch.stack(tensors, out=out.view(-1, *tensors[0].shape))
            return out
        return torch.stack(tensors).reshape(-1, self.rows, self.columns).float()

    def _holds(self, state: Mapping[Tensor, State], key: str) -> bool:
        slices = self._slices.get(key)
        return slices is not None and all(state[p].get(key) is part for p, part in zip(self.params, slices))

    def _rebuild(self, state: Mapping[Tensor, State], name: str, storage: Storage, fill: float) -> None:
        first = self.params[0]
        buffers = storage.allocate(name, first.shape, len(self.params), fill, first.device)
        for key, buffer in buffers.items():
            slices = buffer.unbind()
            for p, part in zip(self.params, slices):
                if key in state[p]:
                    part.copy_(state[p][key])
                state[p][key] = part
            self._buffers[key], self._slices[key] = buffer, slices


class Layout:
    """Divides the parameters of one group into batches, and keeps a batch as long as its members stay together."""

    def __init__(self) -> None:
        self._known: dict[int, Batch] = {}

    def batches(self, params: Iterable[tuple[int, Tensor, Traits]]) -> list[Batch]:
        """Batches of parameters whose shape, dtype, device and traits agree.

        Args:
            params: position in the optimizer, the parameter and its traits.
        """
        alike: dict[tuple, list[tuple[int, Tensor]]] = {}
        total = 0
        for position, p, traits in params:
            alike.setdefault((p.shape, p.dtype, p.device, traits), []).append((position, p))
            total += p.numel()
        limit = min(max(total // _STACKS, _SMALLEST_STACK), LARGEST_STACK)
        result: dict[int, Batch] = {}
        for (_, _, _, traits), members in alike.items():
            size = members[0][1].numel()
            parts = math.ceil(len(members) * size / max(limit, size))
            length = math.ceil(len(members) / parts)
            for start in range(0, len(members), length):
                result[members[start][0]] = self._batch(members[start : start + length], traits)
        self._known = result
        return list(result.values())

    def _batch(self, members: list[tuple[int, Tensor]], traits: Traits) -> Batch:
        positions = [position for position, _ in members]
        params = [p for _, p in members]
        known = self._known.get(positions[0])
        if known is not None and len(known) == len(params) and all(a is b for a, b in zip(known.params, params)):
            known.traits = traits
            return known
        return Batch(params, positions, traits)

"""Parameters of one shape as one stack, so that a rule is a handful of operations and not a handful per parameter.

`optimizer.state[p]` stays the only record of a parameter's states. What it holds are slices of a batch's buffers; a
batch is only a layout, checked against the state at every step. States that were loaded, replaced or left behind by
another batch are copied into new buffers, and nothing else has to know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .checksum import tensor_sums
from .devices import moved
from .rounding import Dither
from .storage import Buffers, Moved, MovingStorage, Storage, low_rank, matrix_shape
from .storage.low_rank import LowRank

# At most this many elements side by side: the half dozen temporary stacks of the rules, 25 MiB each, stay well under
# 256 MiB.
LARGEST_STACK = 6_500_000
# Larger stacks launch fewer operations, smaller ones stay in a CPU's caches. About a dozen do well at both; there are
# more than asked for, because every shape begins a new one.
_STACKS = 7
_SMALLEST_STACK = 512 * 1024
# Where much is done to each stack, those that a CPU keeps in its caches in the meantime, or nearly.
_LARGEST_CACHED = 2 * 1024 * 1024

State = dict[str, Any]


class Traits(NamedTuple):
    """What the parameters of a batch have in common, beside shape, dtype and device.

    Attributes:
        step: how many steps they have taken, the one under way included.
        row_scaled: whether ALLoRA applies to them.
        has_polarity: whether they have a gradient sign from a step before.
        momentum_counts: how often each of their multi-scale momenta has been updated; empty without such momenta.
    """

    step: int
    row_scaled: bool
    has_polarity: bool
    momentum_counts: tuple[int, ...] = ()


@cache
def _stacked_shape(shape: torch.Size) -> torch.Size:
    """The shape in which a parameter is stacked: a kernel of 1x1 as the matrix that it is, with others of its size."""
    ones = 0
    while len(shape) - ones > 2 and shape[len(shape) - ones - 1] == 1:
        ones += 1
    return shape[: len(shape) - ones]


class Batch:
    """Parameters of one group that share dtype, device, traits, and a shape, but for last dimensions of 1.

    Attributes:
        params: the parameters.
        traits: what they have in common.
        parameter_numbers: their positions in the optimizer.
        rows, columns: their shape as matrices: the first dimension, and the others flattened.
    """

    def __init__(self, params: list[Tensor], positions: list[int], traits: Traits) -> None:
        self.params = params
        self.traits = traits
        self.rows, self.columns = matrix_shape(params[0].shape)
        self.parameter_numbers = tuple(positions)
        self._shape = _stacked_shape(params[0].shape)
        self._buffers: Buffers = {}
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
        own = [state[p] for p in self.params]
        fresh = {
            name: self._allocate(name, storage, fills.get(name, 0.0))
            for name, storage in storages.items()
            if not all(self._holds(own, key) for key in storage.keys(name))
        }
        for name, buffers in fresh.items():
            self._fill(state, name, storages[name], buffers)
        wanted = {key for name, storage in storages.items() for key in storage.keys(name)}
        ended = self._buffers.keys() - wanted
        for key in ended:
            del self._buffers[key], self._slices[key]
        # Only then can a parameter have a state that it should not.
        for state_of_p in own if fresh or ended else ():
            for key in [k for k, value in state_of_p.items() if k not in wanted and torch.is_tensor(value)]:
                del state_of_p[key]

    def states(self, storages: Mapping[str, Storage]) -> BatchStates:
        """The states, to be read and written one at a time: they need memory while they are out of their storage."""
        return BatchStates(self, self._buffers, storages)

    def tensor_sums(self) -> dict[str, Tensor]:
        """For each bound state key, the checksums of its tensors, (tensors,) int64 on their device."""
        return {key: tensor_sums(buffer) for key, buffer in self._buffers.items()}

    def dither(self) -> Dither:
        """The noise of this step."""
        return Dither(self.positions(), self.traits.step)

    def gradients(self, out: Tensor | None = None) -> Tensor:
        """The gradients as float32, (tensors, rows, columns): a copy to write into, in `out` where given."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if len(grads) == 1:
            single = grads[0].reshape(1, self.rows, self.columns)
            if out is not None:
                return out.copy_(single)
            return single.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return self._stack(grads, out)

    def weights(self, out: Tensor | None = None) -> Tensor:
        """The parameters as float32, (tensors, rows, columns): a copy, but for a single contiguous float32 one."""
        if len(self.params) == 1:
            return self.params[0].reshape(1, self.rows, self.columns).float()
        return self._stack(self.params, out)

    def write_weights(self, stack: Tensor) -> None:
        """Write a stack of the parameters' own dtype back into them."""
        if stack.data_ptr() != self.params[0].data_ptr():
            torch._foreach_copy_(self._as_stacked(self.params), list(stack.view(-1, *self._shape).unbind()))

    def positions(self) -> Tensor:
        """The parameters' numbers in the optimizer, int32 (tensors,), on their device."""
        device = self.params[0].device
        if self._positions_on_device is None or self._positions_on_device.device != device:
            numbers = torch.tensor(self.parameter_numbers, dtype=torch.int32, device="cpu")
            self._positions_on_device = moved(numbers, device)
        return self._positions_on_device

    def _as_stacked(self, tensors: list[Tensor]) -> list[Tensor]:
        """Views of tensors, in the shape in which they are stacked."""
        dimensions = len(self._shape)
        return [tensor if tensor.ndim == dimensions else tensor.view(self._shape) for tensor in tensors]

    def _stack(self, tensors: list[Tensor], out: Tensor | None) -> Tensor:
        tensors = self._as_stacked(tensors)
        if out is not None:
            stacked = out.view(-1, *self._shape)
            if tensors[0].dtype == out.dtype:
                torch.stack(tensors, out=stacked)
            else:
                torch._foreach_copy_(list(stacked.unbind()), tensors)
            return out
        return torch.stack(tensors).reshape(-1, self.rows, self.columns).float().contiguous()

    def _holds(self, own: Sequence[State], key: str) -> bool:
        """Whether a state of each parameter is still the slice of this batch's buffer that it was given."""
        slices = self._slices.get(key)
        if slices is None or self._buffers[key].device != self.params[0].device:
            return False
        return all(map(is_, map(dict.get, own, repeat(key)), slices))

    def _allocate(self, name: str, storage: Storage, fill: float) -> Buffers:
        """New buffers for one state. What this device cannot store fails here, before any value depends on it."""
        dither = self.dither()
        buffers = storage.allocate(name, self._shape, len(self.params), fill, dither)
        storage.write(name, buffers, storage.read(name, buffers, self.rows, self.columns), dither)
        return buffers

    def _fill(self, state: Mapping[Tensor, State], name: str, storage: Storage, buffers: Buffers) -> None:
        """Fill new buffers with what the parameters have of a state, kept so or in full, and hand them over."""
        dither = self.dither()
        for index, p in enumerate(self.params):
            kept = {key: state[p][key] for key in buffers if key in state[p]}
            if not kept and name in state[p]:
                alone = Dither(dither.positions[index : index + 1], dither.step)
                kept = storage.allocate(name, self._shape, 1, 0.0, alone)
                storage.write(name, kept, state[p][name].clone().view(1, self.rows, self.columns), alone)
                del state[p][name]
            for key, value in kept.items():
                buffers[key][index].copy_(value.view(buffers[key][index].shape))
        for key, buffer in buffers.items():
            slices = buffer.unbind()
            if buffer.shape[1:] == self._shape:  # Values or codes of the elements, in a shape of their parameter's.
                slices = tuple(part.view(p.shape) for part, p in zip(slices, self.params))
            self._buffers[key], self._slices[key] = buffer, slices
            for p, part in zip(self.params, self._slices[key]):
                state[p][key] = part


class BatchStates:
    """Access to the states of a batch, as stacks of (tensors, rows, columns)."""

    def __init__(self, batch: Batch, buffers: Buffers, storages: Mapping[str, Storage]) -> None:
        self._batch = batch
        self._buffers = buffers
        self._storages = storages

    def weights(self, out: Tensor | None = None) -> Tensor:
        """The weights, to update in place: a copy, but for a single contiguous float32 parameter's."""
        return self._batch.weights(out)

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A state, for a rule to update in place; unpacked into `out` where that helps."""
        return self._storages[name].read(name, self._buffers, self._batch.rows, self._batch.columns, out)

    def move(
        self, name: str, target: Tensor, rate: float, out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Moved | None:
        """Move a momentum by a rate towards a target, and keep it.

        Returns:
            A copy of it, as a stack, in `out` where given, and its factor; None where its storage never unpacks it.
        """
        storage = cast(MovingStorage, self._storages[name])
        return storage.move(name, self._buffers, target, rate, self._batch.dither(), out, scratch)

    def add_to(
        self, stack: Tensor, stack_share: float, shares: Sequence[tuple[str, float]], out: Tensor | None = None
    ) -> None:
        """stack_share * stack + the sum of share * state, in `stack`; a state is unpacked into `out` where needed."""
        in_factors = []
        for name, share in shares:
            storage = self._storages[name]
            if isinstance(storage, LowRank):
                in_factors.append((storage, name, share))
            else:
                stack.mul_(stack_share).add_(self.read(name, out), alpha=share)
                stack_share = 1.0
        if in_factors:
            low_rank.add_to(stack, stack_share, in_factors, self._buffers)
        elif stack_share != 1:
            stack.mul_(stack_share)

    def write(self, name: str, stack: Tensor) -> None:
        """Keep an updated state; `stack` may be overwritten."""
        self._storages[name].write(name, self._buffers, stack, self._batch.dither())


class Layout:
    """Divides the parameters of one group into batches, and keeps a batch as long as its members stay together.

    Args:
        cached: whether stacks on a CPU are to stay in its caches. That pays where much is done to each.
    """

    def __init__(self, cached: bool) -> None:
        self._cached = cached
        self._known: dict[int, Batch] = {}

    def batches(self, params: Sequence[tuple[int, Tensor, Traits]]) -> tuple[list[Batch], list[Tensor]]:
        """Batches of parameters whose shape (as stacked), dtype, device and traits agree.

        Args:
            params: position in the optimizer, the parameter and its traits.

        Returns:
            The batches, and the parameters that are in none of them but were in a batch that no longer exists.
        """
        alike: dict[tuple, list[tuple[int, Tensor]]] = {}
        total = 0
        for position, p, traits in params:
            alike.setdefault((_stacked_shape(p.shape), p.dtype, p.device, traits), []).append((position, p))
            total += p.numel()
        result: dict[int, Batch] = {}
        for (_, _, device, traits), members in alike.items():
            largest = _LARGEST_CACHED if self._cached and device.type == "cpu" else LARGEST_STACK
            limit = min(max(total // _STACKS, _SMALLEST_STACK), largest)
            size = members[0][1].numel()
            parts = math.ceil(len(members) * size / max(limit, size))
            length = math.ceil(len(members) / parts)
            for start in range(0, len(members), length):
                result[members[start][0]] = self._batch(members[start : start + length], traits)
        dropped = [batch for position, batch in self._known.items() if result.get(position) is not batch]
        self._known = result
        # Those that are too large for the workspace first, all together: for them it is given up.
        ordered = sorted(result.values(), key=lambda batch: batch.numel() <= LARGEST_STACK)
        present = {p for _, p, _ in params} if dropped else set()
        return ordered, [p for batch in dropped for p in batch.params if p not in present]

    def _batch(self, members: list[tuple[int, Tensor]], traits: Traits) -> Batch:
        positions = [position for position, _ in members]
        params = [p for _, p in members]
        known = self._known.get(positions[0])
        if known is not None and len(known) == len(params) and all(a is b for a, b in zip(known.params, params)):
            known.traits = traits
            return known
        return Batch(params, positions, traits)

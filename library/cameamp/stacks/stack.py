"""Parameters of one shape as one stack.

`optimizer.state[p]` stays the only record of a parameter's states. What it holds are slices of a stack's tensors; a
stack is only a layout, checked against the state at every step. States that were loaded, replaced or left behind by
another stack are copied into new tensors, and nothing else has to know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..devices import moved
from ..rounding import Dither
from ..sharding import WHOLE, Cut
from ..states import in_format, momentum_name
from ..storage import Format, Spread, Stored, matrix_shape
from ..storage.shards import ShardFormat, saved_format
from ..techniques.multiscale import Scale
from ..techniques.sums import OF_WHOLE_TENSORS, Sums
from .momenta import update_momenta

# What `optimizer.state[p]` is.
ParameterState = dict[str, Any]


class Traits(NamedTuple):
    """What the parameters of a stack have in common, besides shape, dtype and device.

    Attributes:
        step: how many steps they have taken, the one under way included.
        row_scaled: whether ALLoRA applies to them.
        has_polarity: whether they have a gradient sign from a step before.
        momentum_counts: how often each of their multi-scale momenta has been updated; empty without such momenta.
        cut: which part of them this process holds.
    """

    step: int
    row_scaled: bool
    has_polarity: bool
    momentum_counts: tuple[int, ...] = ()
    cut: Cut = WHOLE


class Binding(NamedTuple):
    """How a stack is to hold one state.

    Attributes:
        format: how it is stored.
        keys: the keys of its tensors in `optimizer.state[p]`.
        starts_at_lr: whether an element starts at the learning rate, in a parameter that does not have the state yet;
            else at 0.
    """

    format: Format
    keys: tuple[str, ...]
    starts_at_lr: bool


class SavedTensor(NamedTuple):
    """One of a stack's tensors in the form that a checkpoint has.

    Attributes:
        tensor: (tensors, ...), as far as it is here.
        spread: how the processes share each.
        is_made: whether the stack itself has another form.
    """

    tensor: Tensor
    spread: Spread
    is_made: bool


@cache
def stacked_shape(shape: torch.Size) -> torch.Size:
    """The shape in which a parameter is stacked: a kernel of 1x1 as the matrix that it is, with others of its size."""
    ones = 0
    while len(shape) - ones > 2 and shape[len(shape) - ones - 1] == 1:
        ones += 1
    return shape[: len(shape) - ones]


def largest_part(shape: torch.Size, cut: Cut) -> int:
    """How many elements the process holds that has most of a parameter of `shape`."""
    return cut.most_rows(shape) * shape[1:].numel()


class Stack:
    """Parameters of one group that share dtype, device, traits, and a shape, except for last dimensions of 1.

    Of sharded parameters it holds this process's rows, possibly none.

    Attributes:
        params: the parameters.
        traits: what they have in common.
        parameter_numbers: their positions in the optimizer.
        cut: the traits' own.
        whole_rows: how many rows the parameters have as matrices, whose first dimension is rows.
        first_row, rows: which of them are here.
        most_rows: how many the process with most of them has.
        first_element: the first element that is here.
        columns: the other dimensions flattened.
        stored: their states by name, while they are bound.
    """

    def __init__(self, params: list[Tensor], positions: list[int], traits: Traits) -> None:
        self.params = params
        self.traits = traits
        self.parameter_numbers = tuple(positions)
        self.cut = traits.cut
        self.whole_rows, self.columns = matrix_shape(params[0].shape)
        self.first_row, self.rows = self.cut.rows(params[0].shape)
        self.most_rows = self.cut.most_rows(params[0].shape)
        self.first_element = self.first_row * self.columns
        self._shape = _with_rows(self.rows, stacked_shape(params[0].shape))
        self.stored: dict[str, Stored] = {}
        # For each key, the tensor of the whole stack, and the slices of it that the parameters' states hold.
        self._tensors: dict[str, Tensor] = {}
        self._slices: dict[str, tuple[Tensor, ...]] = {}
        self._addresses: dict[str, list[int]] = {}
        # What the last `bind` was asked for and where, and some of the slices, with their addresses.
        self._bindings: Mapping[str, Binding] | None = None
        self._bound_on: torch.device | None = None
        self._looked_at: list[Tensor] = []
        self._expected_at: list[int] = []
        self._positions_on_device: Tensor | None = None

    def __len__(self) -> int:
        return len(self.params)

    def numel(self) -> int:
        """Elements of the whole stack, as far as they are here."""
        return len(self.params) * self.rows * self.columns

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.params[0].device

    # States -----------------------------------------------------------------------------------------------------

    def is_bound(
        self, state: Mapping[Tensor, ParameterState], bindings: Mapping[str, Binding], thorough: bool = False
    ) -> bool:
        """Whether `bind` would change nothing.

        Args:
            state: the optimizer's state.
            bindings: for each state, how to hold it; the same object as at the last `bind`.
            thorough: look at the address of every tensor. Else only of one state of every parameter, and of one
                parameter for every state: trainers that give states other memory give it to all of a parameter's.
        """
        if bindings is not self._bindings or self._bound_on != self.device:
            return False
        own = [state[p] for p in self.params]
        if thorough:
            return all(self._holds(own, key) for key in self._slices)
        kept = all(all(map(is_, map(dict.get, own, repeat(key)), slices)) for key, slices in self._slices.items())
        return kept and _addresses(self.cut, self._looked_at) == self._expected_at

    def bind(self, state: Mapping[Tensor, ParameterState], bindings: Mapping[str, Binding], lr: float) -> None:
        """Make the stack hold the states that `bindings` names, and no others.

        Args:
            state: the optimizer's state.
            bindings: for each state, how to hold it.
            lr: the learning rate that elements start at.
        """
        self._bindings = None  # as long as it is not complete
        own = [state[p] for p in self.params]
        fresh = {
            name: self._allocate(binding, lr)
            for name, binding in bindings.items()
            if not all(self._holds(own, key) for key in binding.keys)
        }
        for name, stored in fresh.items():
            self._hand_over(own, name, bindings[name], stored)
            self.stored[name] = stored
        for name in self.stored.keys() - bindings.keys():
            del self.stored[name]
        wanted = {key for binding in bindings.values() for key in binding.keys}
        ended = self._tensors.keys() - wanted
        for key in ended:
            del self._tensors[key], self._slices[key], self._addresses[key]
        # Only after such a change can a parameter have a state that it should not have.
        for state_of_p in own if fresh or ended else ():
            for key in [k for k, value in state_of_p.items() if k not in wanted and torch.is_tensor(value)]:
                del state_of_p[key]
        first, *others = self._slices.values()
        self._looked_at = [*first, *(slices[0] for slices in others)]
        self._expected_at = _addresses(self.cut, self._looked_at)
        self._bindings, self._bound_on = bindings, self.device

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A state, (tensors, rows, columns), for a rule to update in place; unpacked into `out` if that helps."""
        return self.stored[name].read(out)

    def write(self, name: str, stack: Tensor) -> None:
        """Store an updated state; `stack` may be overwritten."""
        self.stored[name].write(stack, self.dither())

    def update_momenta(
        self,
        scales: Sequence[Scale],
        target: Tensor,
        out: Tensor,
        scratch: Tensor | None = None,
        sums: Sums = OF_WHOLE_TENSORS,
    ) -> None:
        """Take each momentum m to (1 - rate) m + rate * target, and put the sum of share * m into `out`."""
        update_momenta(self.stored, scales, target, self.dither(), out, scratch, sums)

    def rehearsal(self) -> Rehearsal:
        """The stack for a step that is tried and not taken."""
        return Rehearsal(self, self.stored)

    def saved(self) -> dict[str, SavedTensor]:
        """The bound tensors in the form that a checkpoint has, by key."""
        found: dict[str, SavedTensor] = {}
        for binding in (self._bindings or {}).values():
            tensors: Sequence[Tensor] = [self._tensors[key] for key in binding.keys]
            if isinstance(binding.format, ShardFormat):
                tensors = binding.format.by_row(tensors, self._shape)
            kinds = saved_format(binding.format, self._shape).parts(self._shape).values()
            for key, tensor, kind in zip(binding.keys, tensors, kinds):
                found[key] = SavedTensor(tensor, kind.spread, is_made=tensor is not self._tensors[key])
        return found

    def dither(self) -> Dither:
        """The noise of this step."""
        return Dither(self.positions(), self.traits.step, self.first_element)

    # Gradients and weights --------------------------------------------------------------------------------------

    def gradients(self, out: Tensor | None = None) -> Tensor:
        """The gradients as float32, (tensors, rows, columns): a copy to write into, in `out` if it is given."""
        grads = self.cut.local([p.grad for p in self.params if p.grad is not None])
        if len(grads) == 1:
            single = grads[0].reshape(1, self.rows, self.columns)
            if out is not None:
                return out.copy_(single)
            return single.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return self._gather(grads, out)

    def weights(self, out: Tensor | None = None) -> Tensor:
        """The parameters as float32, (tensors, rows, columns): a copy, except of a single contiguous float32 one."""
        if len(self.params) == 1:
            return self.cut.local(self.params)[0].reshape(1, self.rows, self.columns).float()
        return self._gather(self.cut.local(self.params), out)

    def write_weights(self, stack: Tensor) -> None:
        """Write a stack of the parameters' own dtype back into them."""
        params = self.cut.local(self.params)
        if stack.data_ptr() != params[0].data_ptr():
            torch._foreach_copy_(_viewed(params, self._shape), list(stack.view(len(params), *self._shape).unbind()))

    def positions(self) -> Tensor:
        """The parameters' numbers in the optimizer, int32 (tensors,), on their device."""
        if self._positions_on_device is None or self._positions_on_device.device != self.device:
            numbers = torch.tensor(self.parameter_numbers, dtype=torch.int32, device="cpu")
            self._positions_on_device = moved(numbers, self.device)
        return self._positions_on_device

    # The inside -------------------------------------------------------------------------------------------------

    def _gather(self, tensors: Sequence[Tensor], out: Tensor | None) -> Tensor:
        tensors = _viewed(tensors, self._shape)
        if out is not None:
            stacked = out.view(len(tensors), *self._shape)
            if tensors[0].dtype == out.dtype:
                torch.stack(tensors, out=stacked)
            else:
                torch._foreach_copy_(list(stacked.unbind()), tensors)
            return out
        return torch.stack(tensors).reshape(len(tensors), self.rows, self.columns).float().contiguous()

    def _holds(self, own: Sequence[ParameterState], key: str) -> bool:
        """Whether a state of each parameter is still the slice of this stack's tensor that it was given.

        Trainers that offload states put other memory into the same tensors (`v.data = ...`), so addresses count too.
        """
        slices = self._slices.get(key)
        if slices is None or self._tensors[key].device != self.device:
            return False
        if not all(map(is_, map(dict.get, own, repeat(key)), slices)):
            return False
        return _addresses(self.cut, slices) == self._addresses[key]

    def _allocate(self, binding: Binding, lr: float) -> Stored:
        """New tensors for one state. What this device cannot store fails here, before any value depends on it."""
        dither = self.dither()
        stored = binding.format.new(len(self.params), self._shape, self.device)
        if binding.starts_at_lr and lr != 0:
            stored.fill(lr, dither)
        stored.write(stored.read(), dither)
        return stored

    def _hand_over(self, own: Sequence[ParameterState], name: str, binding: Binding, stored: Stored) -> None:
        """Copy what the parameters have of a state into its new tensors, and give each parameter its slices of them.

        A state that somebody has put there uncoded is coded first.
        """
        for place, state_of_p in enumerate(own):
            if name in state_of_p and name not in binding.keys:
                dither = self.dither()
                alone = dither._replace(positions=dither.positions[place : place + 1])
                (values,) = self.cut.local([state_of_p.pop(name)])
                state_of_p |= in_format(name, values, binding.format, self._shape, alone)
        kinds = binding.format.parts(self._shape).values()
        for key, tensor, kind in zip(binding.keys, stored.tensors, kinds):
            for state_of_p, part in zip(own, tensor):
                if key in state_of_p:
                    part.copy_(self.cut.local([state_of_p[key]])[0].view(part.shape))
            slices = tensor.unbind()
            if tensor.shape[1:] == self._shape:  # One value or code per element: give it its parameter's shape.
                slices = tuple(part.view(_with_rows(self.rows, p.shape)) for part, p in zip(slices, self.params))
            slices = self.cut.wrapped(slices, kind.spread, self.whole_rows)
            self._tensors[key], self._slices[key] = tensor, slices
            self._addresses[key] = _addresses(self.cut, slices)
            for state_of_p, part in zip(own, slices):
                state_of_p[key] = part


def _viewed(tensors: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    """Views of tensors in a shape, which some may have already."""
    return [tensor if tensor.ndim == len(shape) else tensor.view(shape) for tensor in tensors]


def _with_rows(rows: int, shape: torch.Size) -> torch.Size:
    """The shape of some rows of a tensor of `shape`."""
    return torch.Size((rows, *shape[1:])) if shape else shape


def _addresses(cut: Cut, tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, cut.local(tensors)))


class Rehearsal:
    """A stack whose weights and states are copies, made as they are asked for: what is written is forgotten."""

    def __init__(self, stack: Stack, stored: Mapping[str, Stored]) -> None:
        self._stack = stack
        self._stored = stored

    def weights(self, out: Tensor | None = None) -> Tensor:
        """A copy of the weights."""
        return self._stack.weights(out).clone()

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A copy of a state."""
        return self._stored[name].read(out).clone()

    def write(self, name: str, stack: Tensor) -> None:
        """Nothing is stored."""

    def update_momenta(
        self,
        scales: Sequence[Scale],
        target: Tensor,
        out: Tensor,
        scratch: Tensor | None = None,
        sums: Sums = OF_WHOLE_TENSORS,
    ) -> None:
        """What updating the momenta would put into `out`."""
        copies = {}
        for name in map(momentum_name, (scale.period for scale in scales)):
            copies[name] = copy.copy(self._stored[name])
            copies[name].tensors = tuple(tensor.clone() for tensor in self._stored[name].tensors)
        update_momenta(copies, scales, target, self._stack.dither(), out, scratch, sums)

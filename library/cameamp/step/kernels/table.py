"""What kernels work on: a table with a row for each tensor, of sizes and addresses.

A kernel visits every tensor where it is. Addresses of states change when a stack is bound anew, so they are looked up
once and cached; those of gradients and weights may change at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from ...stacks.stack import Stack, Traits
from ...states import TABLE, momentum_name
from ...storage import Stored
from ...storage.bits import StoredBits
from ...storage.blockwise import StoredBlockwise
from ...storage.full import StoredFull
from ...storage.linear import StoredLinear
from ...storage.low_rank import StoredLowRank
from ...storage.low_rank_shards import StoredLowRankOfShard
from ...storage.nibbles import StoredNibbles

# The first columns of a row.
NUMEL, ROWS, COLUMNS, POSITION, BLOCK, GRAD, GRAD_KIND, WEIGHT, WEIGHT_KIND, SAMPLE = range(10)

# Of a shard, which is what all of these are of: the elements of the whole tensor, and the first that is here. And for
# how many there is room where elements far apart share a byte, those of the process that has most.
WHOLE_NUMEL, FIRST, SPAN = range(10, 13)

# Then follow, for each state of `states.TABLE` in its order, its kind, its address, and that of its scale.
STATES = 13
KIND, ADDRESS, SCALE = range(3)
STATE_NUMBERS = {state.name: number for number, state in enumerate(TABLE)}
FIELDS = STATES + 3 * len(TABLE)

# For each momentum, in a table of its own: how it is written, and for low rank also the folded matrix, the rank, the
# address of the right factor, the bytes from one row of a factor to the next, of the left one and of the right, and how
# many elements the folded matrix has before the first one.
MOMENTUM_FIELDS = 10
FOLDED_ROWS, FOLDED_COLUMNS, RANK, RIGHT, LEFT_STEP, RIGHT_STEP, LEAD = range(3, 10)

# The same rows by names, for kernels that read records.
ROW = numpy.dtype(
    [
        *((name, numpy.int64) for name in ("numel", "rows", "columns", "position", "block")),
        *((name, numpy.int64) for name in ("grad", "grad_kind", "weight", "weight_kind", "sample")),
        *((name, numpy.int64) for name in ("whole_numel", "first", "span")),
        ("states", numpy.int64, (len(TABLE), 3)),
    ]
)
MOMENTUM = numpy.dtype(
    [
        *((name, numpy.int64) for name in ("kind", "address", "scale", "folded_rows", "folded_columns", "rank")),
        *((name, numpy.int64) for name in ("right", "left_step", "right_step", "lead")),
    ]
)

# How a state is written down.
ABSENT, FLOAT, BOOL, SIGNED, ROOT, EVEN, PACKED, FOUR_BITS, LOW_RANK, LOW_RANK_OF_SHARD = range(-1, 9)

# Floating-point formats of gradients and weights.
FLOAT32, BFLOAT16, FLOAT16 = range(3)
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@dataclass(frozen=True, eq=False)
class Located:
    """Where some tensors' states are: the same object as long as they stay there, and never written to.

    Attributes:
        table: (tensors, FIELDS) int64, without the addresses of gradients and weights.
        momenta: (tensors, periods, MOMENTUM_FIELDS) int64.
    """

    table: numpy.ndarray
    momenta: numpy.ndarray


@dataclass(frozen=True)
class Batch:
    """Tensors that take a step under the same options, at the same step: what one call of a kernel visits.

    Attributes:
        traits: what they have in common.
        stacks: the stacks that they are in, one after the other.
        located: where they are.
    """

    traits: Traits
    stacks: list[Stack]
    located: Located


class Tables:
    """Tables of stacks, with what stays the same from step to step cached."""

    def __init__(self) -> None:
        # Weak: a stack that is given up must not keep its states alive.
        self._known: WeakKeyDictionary[Stack, tuple[tuple[int, ...], Located]] = WeakKeyDictionary()
        # What the stacks of a batch come to, by the first of them, beside what each of them had.
        self._joined: WeakKeyDictionary[Stack, tuple[list[Located], Located]] = WeakKeyDictionary()

    def batches(self, stacks: Sequence[Stack], periods: Sequence[int]) -> list[Batch]:
        """The tensors of some bound stacks, by their traits.

        Args:
            stacks: stacks of one group, bound.
            periods: those of its multi-scale momenta.
        """
        alike: dict[Traits, list[Stack]] = {}
        for stack in stacks:
            alike.setdefault(stack.traits, []).append(stack)
        return [Batch(traits, own, self._join(own, periods)) for traits, own in alike.items()]

    def _join(self, stacks: list[Stack], periods: Sequence[int]) -> Located:
        parts = [self._locate(stack, periods) for stack in stacks]
        known = self._joined.get(stacks[0])
        if known is None or known[0] != parts:
            tables, momenta = zip(*((part.table, part.momenta) for part in parts))
            known = (parts, Located(numpy.concatenate(tables), numpy.concatenate(momenta)))
            self._joined[stacks[0]] = known
        return known[1]

    def _locate(self, stack: Stack, periods: Sequence[int]) -> Located:
        stored = stack.stored
        addresses = tuple([tensor.data_ptr() for state in stored.values() for tensor in state.tensors])
        known = self._known.get(stack)
        if known is None or known[0] != addresses:
            known = (addresses, Located(_rows_of(stack), _momenta_of(stack, periods)))
            self._known[stack] = known
        return known[1]


def as_records(table: numpy.ndarray, kind: numpy.dtype) -> numpy.ndarray:
    """A table as records, in place of its last dimension."""
    return numpy.ascontiguousarray(table).view(kind).reshape(table.shape[:-1])


def with_gradients(batch: Batch) -> tuple[numpy.ndarray, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """The batch's table with the addresses of gradients and weights as they are now.

    Tensors that a kernel cannot read where they are, because they are not contiguous, negated when read, or of another
    dtype, are copied.

    Returns:
        The table; the weights that were copied, each beside its copy, which is to be written back; and the gradients
        that were copied, which must outlive the kernel's call.
    """
    params = [p for stack in batch.stacks for p in stack.cut.local(stack.params)]
    grads = [g for stack in batch.stacks for g in stack.cut.local([p.grad for p in stack.params if p.grad is not None])]
    table = batch.located.table.copy()
    kept, _ = _enter_addresses(table[:, GRAD : GRAD_KIND + 1], grads)
    _, written_back = _enter_addresses(table[:, WEIGHT : WEIGHT_KIND + 1], params)
    return table, written_back, kept


def _enter_addresses(fields: numpy.ndarray, tensors: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Write down where tensors are, and their dtype, as a kernel can read them: as copies, if it must be.

    Returns:
        The copies, and each beside what it is a copy of.
    """
    read, pairs = tensors, list[tuple[Tensor, Tensor]]()
    dtypes = [x.dtype for x in tensors]
    in_place = all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))
    if not in_place or not DTYPES.keys() >= set(dtypes):
        read, pairs = _readable(tensors)
        dtypes = [x.dtype for x in read]
    fields[:, 0] = list(map(Tensor.data_ptr, read))
    fields[:, 1] = [DTYPES[dtype] for dtype in dtypes]
    return [copy for _, copy in pairs], pairs


def _readable(tensors: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The tensors as a kernel can read them; and those that it cannot read where they are, each beside its copy."""
    odd = [n for n, x in enumerate(tensors) if x.dtype not in DTYPES or not x.is_contiguous() or x.is_neg()]
    read = list(tensors)
    for place in odd:
        dtype = tensors[place].dtype if tensors[place].dtype in DTYPES else torch.float32
        read[place] = tensors[place].detach().resolve_neg().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return read, [(tensors[place], read[place]) for place in odd]


def _rows_of(stack: Stack) -> numpy.ndarray:
    """The rows of a stack's tensors, without what changes from step to step."""
    n = len(stack)
    rows = numpy.zeros((n, FIELDS), dtype=numpy.int64)
    rows[:, NUMEL] = stack.rows * stack.columns
    rows[:, ROWS], rows[:, COLUMNS] = stack.rows, stack.columns
    rows[:, POSITION] = stack.parameter_numbers
    rows[:, WHOLE_NUMEL], rows[:, FIRST] = stack.whole_rows * stack.columns, stack.first_element
    rows[:, SPAN] = stack.most_rows * stack.columns
    states = stack.stored.values()
    rows[:, BLOCK] = next((state.block for state in states if isinstance(state, StoredBlockwise)), 0)
    for name, number in STATE_NUMBERS.items():
        place = STATES + 3 * number
        rows[:, place + KIND] = ABSENT
        if name in stack.stored:
            _enter(rows[:, place : place + 3], stack.stored[name])
    return rows


def _momenta_of(stack: Stack, periods: Sequence[int]) -> numpy.ndarray:
    momenta = numpy.full((len(stack), len(periods), MOMENTUM_FIELDS), ABSENT, dtype=numpy.int64)
    for place, period in enumerate(periods):
        stored = stack.stored[momentum_name(period)]
        _enter(momenta[:, place], stored)
        if isinstance(stored, StoredLowRank):
            momenta[:, place, FOLDED_ROWS : RANK + 1] = stored.folded.rows, stored.folded.columns, stored.folded.rank
            *factors, scale = stored.factors()
            for column, tensor in zip((ADDRESS, RIGHT, SCALE), (*factors, scale)):
                momenta[:, place, column] = _addresses(tensor)
            momenta[:, place, LEFT_STEP : RIGHT_STEP + 1] = [factor.stride(1) for factor in factors]
            momenta[:, place, LEAD] = stored.lead
    return momenta


def _enter(fields: numpy.ndarray, stored: Stored) -> None:
    """Write down a state's kind, and for each tensor of the stack where it and its scale are."""
    fields[:, KIND] = _kind(stored)
    for place, tensor in enumerate(stored.tensors[:2]):
        fields[:, ADDRESS + place] = _addresses(tensor)


def _addresses(tensor: Tensor) -> numpy.ndarray:
    """Where the parts of a tensor of a stack are."""
    step = tensor.stride(0) * tensor.element_size() if len(tensor) > 1 else 0
    return tensor.data_ptr() + step * numpy.arange(len(tensor))


def _kind(stored: Stored) -> int:
    match stored:
        case StoredFull():
            return BOOL if stored.tensors[0].dtype == torch.bool else FLOAT
        case StoredBlockwise():
            return ROOT if stored.root else SIGNED
        case StoredLinear():
            return EVEN
        case StoredBits():
            return PACKED
        case StoredNibbles():
            return FOUR_BITS
        case StoredLowRankOfShard():
            return LOW_RANK_OF_SHARD
        case StoredLowRank():
            return LOW_RANK
    raise TypeError(f"no kernel reads {type(stored).__name__}")

"""The table of states: what a parameter carries from step to step.

`TABLE` says of every state what it is called, how long it lives, where it starts, what its elements can be, and how it
is stored in 32 and in 8 bits; `momentum` makes such a row for each multi-scale momentum. Binding a stack, saving,
loading, converting, counting memory and the documents' table all go over these rows, so adding a state is adding a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import OptimizerConfig
from .phase import Phase
from .rounding import Dither
from .storage import Format, matrix_shape
from .storage.averages import average_formats
from .storage.bits import Bits
from .storage.blockwise import SMALLEST_BLOCK, Blockwise, block_of, block_of_shard
from .storage.by_row import ByRow
from .storage.factored import Factored
from .storage.full import Full
from .storage.linear import Linear
from .storage.low_rank import LowRank
from .storage.low_rank_shards import LowRankByRow, LowRankOfShard
from .storage.nibbles import Nibbles
from .storage.shards import BitsOfShard, BlockwiseOfShard, FullOfShard, NibblesOfShard, Place, ShardAverageFormat

# The 8-bit optimizers do not code smaller parameters: there is nothing to save.
SMALLEST_CODED = 256
# The 32-bit optimizers keep the momenta of smaller parameters exact: who takes them has the memory.
SMALLEST_CODED_MOMENTUM = 4096

# The code of a state, by the group's options, the parameter's shape, and a block that divides its element count.
_Code = Callable[[OptimizerConfig, torch.Size, int], Format]


@dataclass(frozen=True)
class State:
    """A row of the table.

    Attributes:
        name: its key in `optimizer.state[p]`; the keys of its codes begin with it.
        holds: what it is, for the documents.
        code: how it is stored in 8 bits, by the group's options, the parameter's shape and the block.
        dtype: of its elements when they are not coded.
        warmup_only: whether it lives in the warm-up alone.
        came_only: whether it lives with `came=True` alone.
        starts_at_lr: whether its elements start at the group's learning rate; else at 0.
        never_negative: whether a negative element is damage.
        within_lr_bounds: whether its elements stay from min_lr to max_lr.
        always_coded: whether the 32-bit optimizers code it too.
        factors: whether the option `factored` stores it as means of rows and columns.
        counter: the key under which its updates are counted; "" if the parameter's step is that count.
        code_if_sharded: how it is stored in 8 bits where processes share its rows; None for as `code` would.
    """

    name: str
    holds: str
    code: _Code
    dtype: torch.dtype = torch.float32
    warmup_only: bool = False
    came_only: bool = False
    starts_at_lr: bool = False
    never_negative: bool = False
    within_lr_bounds: bool = False
    always_coded: bool = False
    factors: bool = False
    counter: str = ""
    code_if_sharded: _Code | None = None

    @property
    def when(self) -> str:
        """When a parameter has it, for the documents."""
        if self.always_coded:
            return "contextual, each K of `momentum_scales`"
        return "`step` below `warmup_steps`" if self.warmup_only else "`came=True`" if self.came_only else "always"

    def lives(self, phase: Phase, came: bool) -> bool:
        """Whether a parameter has this state."""
        return (phase.warmup or not self.warmup_only) and (came or not self.came_only)

    @property
    def full(self) -> Full:
        """Its format when it is not coded."""
        return Full(self.dtype)

    def code_of_shard(self, config: OptimizerConfig, shape: torch.Size, place: Place) -> Format | None:
        """How a shard of a parameter of `shape` stores it in 8 bits; None if it does not."""
        _, columns = matrix_shape(shape)
        block = block_of_shard(columns, config.blocksize)
        if block is None and not self.always_coded:
            return None
        code = (self.code_if_sharded or self.code)(config, shape, block or 0)
        match code:
            case Blockwise():
                return BlockwiseOfShard(code.signed, code.root, code.block, place.most_rows)
            case Bits():
                return BitsOfShard(place.most_rows)
            case Nibbles():
                return NibblesOfShard(place.most_rows, shape.numel())
            case LowRank():
                return LowRankOfShard(code.columns, code.rank, place)
        return code

    def format_of(
        self, saved: Mapping[str, Any], shape: torch.Size, config: OptimizerConfig, whole: torch.Size | None = None
    ) -> Format | None:
        """The format in which one parameter's saved state holds this state; None if it does not.

        Args:
            saved: the parameter's state.
            shape: the parameter's, as far as it is there.
            config: the options that it was saved under.
            whole: the parameter's own, if only some of its rows are there.

        Raises:
            ValueError: what it holds is of no format of this state; with the key and the reason.
        """
        if self.name in saved:
            found: Format = self.full
        elif self.factors and f"{self.name}_row" in saved:
            found = Factored()
        elif f"{self.name}_q" in saved and (not self.always_coded or (whole or shape).numel() >= SMALLEST_CODED):
            found = self._code_of(saved, config, whole or shape)
        else:
            return None
        tensors = {}
        for suffix, part in found.parts(shape).items():
            tensors[suffix] = _checked(saved, self.name + suffix, part.dtype)
        try:
            found = found.as_saved(tensors, shape)
        except ValueError as error:
            suffix, _, reason = str(error).partition(": ")
            raise ValueError(f"the state '{self.name}{suffix}' {reason}") from None
        plain = isinstance(found, (Full, Factored))
        if self.never_negative and plain and any((tensor < 0).any() for tensor in tensors.values()):
            raise ValueError(f"the state '{self.name}' has negative elements")
        return found

    def _code_of(self, saved: Mapping[str, Any], config: OptimizerConfig, shape: torch.Size) -> Format:
        """Its code, for a parameter of `shape`; by row if the saved tensors have rows in front."""
        if f"{self.name}_q_right" in saved:
            return LowRankByRow(shape[1:].numel(), 1)
        plain = self.code(config, shape, SMALLEST_BLOCK)
        *_, (suffix, part) = plain.parts(shape).items()
        value = saved.get(self.name + suffix)
        if not isinstance(value, Tensor) or value.ndim <= len(part.shape):
            return plain
        columns = torch.Size((matrix_shape(shape)[1],))
        # Momenta that are not of low rank have four bits; those of older checkpoints were of low rank in each row.
        codes = saved.get(f"{self.name}_q")
        is_four_bits = self.always_coded and isinstance(codes, Tensor) and codes.ndim == 2
        return ByRow(Nibbles() if is_four_bits else self.code(config, columns, SMALLEST_BLOCK))


def _signed(config: OptimizerConfig, shape: torch.Size, block: int) -> Format:
    return Blockwise(signed=True, root=False, block=block)


def _root(config: OptimizerConfig, shape: torch.Size, block: int) -> Format:
    return Blockwise(signed=False, root=True, block=block)


def _between_the_bounds(config: OptimizerConfig, shape: torch.Size, block: int) -> Format:
    return Linear(config.min_lr, config.max_lr)


def _one_bit(config: OptimizerConfig, shape: torch.Size, block: int) -> Format:
    return Bits()


def _average(period: int, sharded: bool, config: OptimizerConfig, shape: torch.Size, block: int) -> Format:
    return average_formats(config.momentum_scales, shape, sharded)[period]


TABLE = (
    State(
        "lr_mask",
        "learning rate of each element",
        _between_the_bounds,
        starts_at_lr=True,
        never_negative=True,
        within_lr_bounds=True,
    ),
    State("exp_avg", "momentum", _signed),
    State("exp_avg_res", "running mean of the squared residual", _root, never_negative=True, factors=True),
    State(
        "exp_avg_sq", "running mean of the squared gradient", _root, came_only=True, never_negative=True, factors=True
    ),
    State("s", "torque-aware momentum's smoothed correlation", _signed, warmup_only=True),
    State("last_polarity", "whether the gradient was above 0", _one_bit, dtype=torch.bool, warmup_only=True),
)
LR_MASK = TABLE[0]


def momentum(period: int) -> State:
    """The row of the multi-scale momentum that is updated at every `period`-th step."""

    return State(
        momentum_name(period),
        f"momentum of every {period} steps",
        partial(_average, period, False),
        always_coded=True,
        counter=f"momentum_count_{period}",
        code_if_sharded=partial(_average, period, True),
    )


def momentum_name(period: int) -> str:
    """The name of the momentum that is updated at every `period`-th step."""
    return f"{MOMENTUM_PREFIX}{period}"


# The names of multi-scale momenta begin with this.
MOMENTUM_PREFIX = "momentum_scale_"

# For readers of a checkpoint; `state_dict` computes them from the rest, and loading ignores them.
DERIVED = {
    "avg_lr": "mean of lr_mask",
    "lr_max": "largest learning rate that the group has had",
    "row_scaling": "ALLoRA's factor of each row, of LoRA factors",
}


@dataclass(frozen=True)
class Precision:
    """Which states an optimizer codes.

    Attributes:
        codes_all: whether every state is coded, as in the 8-bit optimizers; else only those that always are.
        codes_none: whether nothing is, for measurements of what codes cost.
    """

    codes_all: bool = False
    codes_none: bool = False

    def format(self, state: State, shape: torch.Size, config: OptimizerConfig, place: Place | None = None) -> Format:
        """The format of a state of a parameter of `shape` under a group's options.

        Args:
            state: the state.
            shape: the parameter's.
            config: the group's options.
            place: where this process's shard of it is; None if it is not sharded.
        """
        if config.factored and state.factors and len(shape) > 1 and place is None:
            return Factored()
        count = shape.numel()
        smallest = SMALLEST_CODED if self.codes_all else SMALLEST_CODED_MOMENTUM
        if self.codes_none or count < smallest or not (self.codes_all or state.always_coded):
            return state.full
        if place is not None:
            return state.code_of_shard(config, shape, place) or state.full
        block = block_of(count, config.blocksize)
        if block is None and not state.always_coded:
            return state.full
        return state.code(config, shape, block or count)


def uncoded(state: State, code: Format) -> Format:
    """The format of a state that this process fails to code, from the one in which it would."""
    return FullOfShard(state.dtype, code) if isinstance(code, ShardAverageFormat) else state.full


THIRTY_TWO_BITS = Precision()
EIGHT_BITS = Precision(codes_all=True)


def bytes_of(
    shape: torch.Size, phase: Phase, config: OptimizerConfig, precision: Precision, periods: Collection[int] = ()
) -> int:
    """What the states of one parameter take, as `optimizer.state[p]` holds them.

    Args:
        shape: the parameter's.
        phase: the phase that it is in.
        config: its group's options.
        precision: which states are coded.
        periods: those of its multi-scale momenta; none in the plain optimizers.
    """
    rows = [row for row in TABLE if row.lives(phase, config.came)] + [momentum(period) for period in periods]
    return sum(precision.format(row, shape, config).bytes(shape) for row in rows)


def to_full(state: State, saved: Mapping[str, Any], written: Format, shape: torch.Size) -> Tensor:
    """One parameter's state in float32 (or bool), of the parameter's shape; a copy.

    Args:
        state: which.
        saved: the parameter's states, by key.
        written: the format that this one is in.
        shape: the parameter's.
    """
    tensors = [saved[key].detach().contiguous().unsqueeze(0) for key in written.keys(state.name)]
    return written.over(tensors, shape).read().reshape(shape).clone()


def in_format(name: str, values: Tensor, wanted: Format, shape: torch.Size, dither: Dither) -> dict[str, Tensor]:
    """One parameter's state in a format, by key.

    Args:
        name: the state's.
        values: its elements, on the device on which to code them.
        wanted: the format.
        shape: the parameter's.
        dither: what rounding may depend on: the parameter's position, and its next step.
    """
    stored = wanted.new(1, shape, values.device)
    stored.write(values.clone().reshape(1, stored.rows, stored.columns), dither)
    return {key: tensor[0] for key, tensor in zip(wanted.keys(name), stored.tensors)}


def _checked(saved: Mapping[str, Any], key: str, dtype: torch.dtype) -> Tensor:
    if key not in saved:
        raise ValueError(f"the state '{key}' is missing")
    value = saved[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"the state '{key}' is {type(value).__name__}, not a tensor")
    if value.dtype != dtype:
        raise ValueError(f"the state '{key}' is {value.dtype}, not {dtype}")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"the state '{key}' has elements that are not finite")
    return value

"""8-bit states: bitsandbytes' dynamic maps, blockwise (arXiv 2110.02861), with codes that are exact on every device.

A code is an index into a table of 256 values between -1 and 1 (or 0 and 1) that lie closer together near 0; a block of
elements shares a scale, its largest magnitude. bitsandbytes' own CPU kernel looks codes up in 65,536 even bins, so that
it decodes 0 as something else and small values as multiples of themselves; here a value always gets its nearest code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import moved
from ..rounding import Dither
from . import Format, Part, Stored

SMALLEST_BLOCK = 64
# A row of a shard is cut into blocks no shorter than this: with its scale one takes half of what float32 does.
_SMALLEST_BLOCK_OF_ROW = 4
_LANES = 16

# Elements that are coded at a time: the integers needed in between take three times the memory of the values.
_PART = 4 * 1024 * 1024

# A float32's sign, exponent and first 7 bits of its fraction are its upper 16 bits; those of 1.0 and of -1.0:
_ONE, _MINUS_ONE = 0x3F80, 0xBF80


def block_of(count: int, largest: int) -> int | None:
    """The largest power of two from 64 to `largest` that divides an element count; None if there is none."""
    block = largest
    while block >= SMALLEST_BLOCK:
        if count % block == 0:
            return block
        block //= 2
    return None


def block_of_shard(columns: int, largest: int) -> int | None:
    """A block that begins and ends between rows, or divides one: at most `largest`, and near to it; None if none does.

    Of several rows it is whole sixteens, if so many rows can be, which are what processors compute with.
    """
    if columns <= largest:
        rows, step = largest // columns, _LANES // math.gcd(_LANES, columns)
        return columns * (rows - rows % step or rows)
    for parts in range(-(-columns // largest), columns // _SMALLEST_BLOCK_OF_ROW + 1):
        if columns % parts == 0:
            return columns // parts
    return None


@dataclass(frozen=True)
class Blockwise(Format):
    """Blocks of one scale each, in a dynamic map.

    Attributes:
        signed: whether values can be negative.
        root: write the square root; for values that are divided by their root, and may span twice the magnitudes.
        block: elements in a block; divides the element count of a parameter. Of a shard the last one may be shorter.
    """

    signed: bool
    root: bool
    block: int

    suffixes = ("_q", "_q_scale")

    def parts(self, shape: torch.Size) -> dict[str, Part]:
        return {
            "_q": Part(torch.uint8, tuple(shape), _code_of_zero(self.signed)),
            "_q_scale": Part(torch.float32, (shape.numel() // self.block,)),
        }

    def over(self, tensors: Sequence[Tensor], shape: torch.Size) -> StoredBlockwise:
        return StoredBlockwise(self, tensors, shape)

    def as_saved(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> Blockwise:
        """As of `Format`; blocks of any allowed size are accepted."""
        codes, scale = tensors["_q"], tensors["_q_scale"]
        if codes.shape != shape:
            raise ValueError(f"_q: has shape {tuple(codes.shape)}")
        block = shape.numel() // max(scale.numel(), 1)
        smallest = min(_SMALLEST_BLOCK_OF_ROW, max(shape.numel(), 1))  # A row of a shard may be one block, and shorter.
        if scale.ndim != 1 or block < smallest or block * scale.numel() != shape.numel():
            raise ValueError(f"_q_scale: has shape {tuple(scale.shape)}, which divides {tuple(shape)} into no blocks")
        if (scale < 0).any():
            raise ValueError("_q_scale: has negative elements")
        return Blockwise(self.signed, self.root, block)


class StoredBlockwise(Stored):
    """A state in the format `Blockwise`."""

    def __init__(self, blockwise: Blockwise, tensors: Sequence[Tensor], shape: torch.Size) -> None:
        super().__init__(tensors, shape)
        self.signed, self.root, self.block = blockwise.signed, blockwise.root, blockwise.block

    def read(self, out: Tensor | None = None) -> Tensor:
        codes, scale = self.tensors
        tables = tables_of(self.signed, codes.device)
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for part, its_codes in zip(values.view(-1).split(_PART), codes.view(-1).split(_PART)):
            torch.index_select(tables.values, 0, its_codes.int(), out=part)
        rows = values.flatten(1)
        blocks, end = self._whole_blocks(rows.shape[1])
        rows[:, :end].view(len(codes), blocks, self.block).mul_(scale[:, :blocks].unsqueeze(2))
        if end < rows.shape[1]:
            rows[:, end:].mul_(scale[:, blocks : blocks + 1])
        return (values.square_() if self.root else values).view(len(codes), self.rows, self.columns)

    def write(self, stack: Tensor, dither: Dither) -> None:
        codes, scales = self.tensors
        rows, own_codes = stack.flatten(1), codes.flatten(1)
        blocks, end = self._whole_blocks(rows.shape[1])
        self._write(rows[:, :end], own_codes[:, :end], scales[:, :blocks], self.block)
        if end < rows.shape[1]:
            self._write(rows[:, end:], own_codes[:, end:], scales[:, blocks : blocks + 1], rows.shape[1] - end)

    def _whole_blocks(self, count: int) -> tuple[int, int]:
        """How many whole blocks so many elements have, and where they end."""
        blocks = count // self.block
        return blocks, blocks * self.block

    def _write(self, values: Tensor, codes: Tensor, scales: Tensor, block: int) -> None:
        """Code the blocks of (tensors, elements)."""
        tables = tables_of(self.signed, codes.device)
        blocks = values.reshape(-1, block).contiguous()
        if self.root:
            blocks.sqrt_()
        scale = torch.maximum(blocks.amax(dim=1), blocks.amin(dim=1).neg_())
        scales.copy_(scale.view_as(scales))
        blocks.div_(torch.where(scale > 0, scale, 1.0).unsqueeze(1))
        found = codes if codes.is_contiguous() else torch.empty_like(codes, memory_format=torch.contiguous_format)
        for part, its_codes in zip(blocks.view(-1).split(_PART), found.view(-1).split(_PART)):
            _nearest_codes(part, tables, out=its_codes)
        if found is not codes:
            codes.copy_(found)


class Tables(NamedTuple):
    """What coding needs, on one device.

    Attributes:
        values: the 256 values, ascending.
        midpoints: between each value and the next; infinity after the last.
        first: for the upper 16 bits of a float32 from -1 to 1, the code of the smallest number that has them; for
            any other bits 0, so that an index never lies outside.
    """

    values: Tensor
    midpoints: Tensor
    first: Tensor


def _nearest_codes(x: Tensor, tables: Tables, out: Tensor) -> None:
    """The code of the value nearest to each element of x, which lies within -1 and 1; 1-d, into uint8 `out`.

    Numbers with the same upper 16 bits lie so close together that at most one midpoint falls between them.
    """
    upper = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    torch.index_select(tables.first, 0, upper, out=out)
    beyond = x > tables.midpoints.index_select(0, out.int())
    out.add_(beyond.view(torch.uint8))


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of bitsandbytes' codes, ascending, float32 on the CPU.

    Raises:
        Exception: whatever bitsandbytes raises where it is missing or broken.
    """
    from bitsandbytes.functional import create_dynamic_map

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # Older versions make it of the default dtype,
    try:
        with torch.device("cpu"):  # and on the default device.
            values: Tensor = create_dynamic_map(signed=signed)
            return values
    finally:
        torch.set_default_dtype(before)


_map = cache(dynamic_map)


@cache
def _code_of_zero(signed: bool) -> int:
    return _map(signed).tolist().index(0.0)


@cache
def tables_of(signed: bool, device: torch.device) -> Tables:
    values = _map(signed)
    beyond = torch.full((1,), torch.inf, dtype=torch.float32, device="cpu")
    midpoints = torch.cat([(values[:-1] + values[1:]) / 2, beyond])
    upper = torch.arange(_MINUS_ONE + 1 if signed else _ONE + 1, dtype=torch.int64, device="cpu")
    bits = upper << 16
    # Of negative numbers the one with all lower bits set is the smallest, but none is below -1.
    negative = upper >= 0x8000
    bits = torch.where(negative, (bits | 0xFFFF) - 2**32, bits).to(torch.int32)
    smallest = bits.view(torch.float32).nan_to_num(1.0).clamp(-1.0, 1.0)
    first = torch.zeros(1 << 16, dtype=torch.uint8, device="cpu")
    first[: len(upper)] = torch.bucketize(smallest, midpoints[:-1]).to(torch.uint8)
    return Tables(*(moved(table, device) for table in (values, midpoints, first)))


def require_bitsandbytes() -> None:
    """Raise RuntimeError, saying what to install, if bitsandbytes' 8-bit maps cannot be had."""
    try:
        usable = dynamic_map(signed=True).numel() == 256
    except Exception as error:  # A broken installation fails with whatever its libraries raise.
        raise RuntimeError(f"{_HELP} ({type(error).__name__}: {error})") from error
    if not usable:
        raise RuntimeError(_HELP)


_HELP = (
    "8-bit states need bitsandbytes: pip install 'bitsandbytes>=0.43'; "
    "meanwhile Automagic_CameAMP does the same with 32-bit states"
)

"""Loops over many short rows, eight elements at a time, written in the compiler's own terms.

The compiler vectorizes long inner loops. The rows of a LoRA's up factor are its rank, 16 elements say, and what sets
such a loop up takes longer than the loop: here eight numbers are one value from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_EIGHT = ir.VectorType(_FLOAT, 8)
_FAST = ("reassoc", "contract", "nsz")

# Builds the body of a loop over rows: of the builder, the row's number, and the arguments.
_Body = Callable[[ir.IRBuilder, ir.Value, Sequence[ir.Value]], None]


def _over_rows(body: _Body, *arguments: types.Type) -> Any:
    """A function of a number of rows and some arguments, which does something to each row: signature and generator."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
        with cgutils.for_range(builder, values[0]) as loop:
            body(builder, loop.index, values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, *arguments), generate


def _pointer(builder: ir.IRBuilder, address: ir.Value, number: ir.Value, size: int, kind: ir.Type) -> ir.Value:
    """The place of the element of a number, in memory of elements of a size."""
    offset = builder.mul(number, ir.Constant(number.type, size))
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, number: ir.Value) -> ir.Value:
    return builder.load(_pointer(builder, address, number, 4, _EIGHT), align=4)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, number: ir.Value) -> None:
    builder.store(value, _pointer(builder, address, number, 4, _EIGHT), align=4)


def _float_at(builder: ir.IRBuilder, address: ir.Value, number: ir.Value) -> ir.Value:
    return builder.load(_pointer(builder, address, number, 4, _FLOAT), align=4)


def _eight_times(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(_EIGHT, ir.Undefined), value, ir.IntType(32)(0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
    return builder.shuffle_vector(first, ir.Constant(_EIGHT, ir.Undefined), mask)


def _eights(builder: ir.IRBuilder, eights: ir.Value) -> Any:
    return cgutils.for_range(builder, eights)


def _row_squares(builder: ir.IRBuilder, row: ir.Value, values: Sequence[ir.Value]) -> None:
    eights, x, out = values
    total = cgutils.alloca_once_value(builder, ir.Constant(_EIGHT, [0.0] * 8))  # type: ignore[no-untyped-call]
    builder.store(ir.Constant(_EIGHT, [0.0] * 8), total)
    with _eights(builder, eights) as loop:
        place = builder.mul(builder.add(builder.mul(row, eights), loop.index), ir.Constant(row.type, 8))
        part = _load(builder, x, place)
        square = builder.fmul(part, part, flags=_FAST)
        builder.store(builder.fadd(builder.load(total), square, flags=_FAST), total)
    kind = ir.FunctionType(_FLOAT, [_FLOAT, _EIGHT])
    reduce = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        builder.module, kind, "llvm.vector.reduce.fadd.v8f32"
    )
    result = builder.call(reduce, [ir.Constant(_FLOAT, 0.0), builder.load(total)], fastmath=_FAST)
    builder.store(result, _pointer(builder, out, row, 4, _FLOAT), align=4)


def _fill_rows(builder: ir.IRBuilder, row: ir.Value, values: Sequence[ir.Value]) -> None:
    eights, factors, common, out = values
    value = _eight_times(builder, builder.fmul(_float_at(builder, factors, row), common))
    with _eights(builder, eights) as loop:
        place = builder.mul(builder.add(builder.mul(row, eights), loop.index), ir.Constant(row.type, 8))
        _store(builder, value, out, place)


_int, _real = types.int64, types.float32


@intrinsic
def row_squares(typing_context: Any, rows: Any, eights: Any, x: Any, out: Any) -> Any:
    """The sum of squares of each row, all of so many eights; `x` and `out` are addresses."""
    return _over_rows(_row_squares, _int, _int, _int)


@intrinsic
def fill_rows(typing_context: Any, rows: Any, eights: Any, factors: Any, common: Any, out: Any) -> Any:
    """Each row filled with its factor times a common one; `factors` and `out` are addresses."""
    return _over_rows(_fill_rows, _int, _int, _real, _int)

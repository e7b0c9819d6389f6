"""Sixteen float32 numbers as one value, which takes the place of a number in the formulas of `rules.py`.

What the compiler makes of a loop over numbers depends on whether it can prove that no two arrays overlap, which it
cannot for as many as a step has. Here sixteen neighbouring elements are one value from the start: the loop over them
needs no proof, takes all rules in one pass over memory, and is compiled in a tenth of the time.

Loops go over whole sixteens. Where a tensor ends in fewer, `codes.py` copies these into a block that is filled up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from .jit import FAST, within

LANES = 16

_FLOAT, _DOUBLE, _BIT = ir.FloatType(), ir.DoubleType(), ir.IntType(1)
_FLAGS = tuple(sorted(FAST))


class _Lanes(types.Type):
    """Sixteen values of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(name=f"Lanes({kind})")
        self.kind = kind

    @property
    def element(self) -> ir.Type:
        return _ELEMENTS[self.kind]

    @property
    def vector(self) -> ir.VectorType:
        return ir.VectorType(self.element, LANES)


_ELEMENTS = {"float32": _FLOAT, "float64": _DOUBLE, "bool": _BIT}
FLOATS, DOUBLES, TRUTHS = (_Lanes(kind) for kind in _ELEMENTS)


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, kind.vector)  # type: ignore[no-untyped-call]


def _inside(function: Callable[..., Any]) -> Any:
    """A function that the compiler's own terms are given for."""
    return intrinsic(function)


def _wide(builder: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    """A value of sixteen, or a number sixteen times over."""
    if isinstance(kind, _Lanes):
        return value
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """Call one of the compiler's own functions; of sixteen values unless it makes one of them."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
    return builder.call(function, arguments, fastmath=_FLAGS)


def _suffix(vector: ir.VectorType) -> str:
    return f"v{LANES}f{32 if vector.element == _FLOAT else 64}"


# Operators ------------------------------------------------------------------------------------------------------


def _define(operation: Callable[..., Any], result: _Lanes | None, generate: Callable[..., ir.Value]) -> None:
    """Define an operator of two, of which either may be one number; `result` is None for the kind of the lanes."""

    def typed(arguments: Sequence[types.Type]) -> Any:
        for kind, number in ((FLOATS, types.float32), (DOUBLES, types.float64)):
            if len(arguments) == 2 and kind in arguments and all(each in (kind, number) for each in arguments):
                return signature(result or kind, *arguments)  # type: ignore[no-untyped-call]
        return None

    class Template(AbstractTemplate):
        def generic(self, arguments: Sequence[types.Type], keywords: Any) -> Any:
            return typed(arguments)

    infer_global(operation)(Template)  # type: ignore[no-untyped-call]

    def lower(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        return generate(builder, *(_wide(builder, kind, value) for kind, value in zip(kinds.args, values)))

    for kind, number in ((FLOATS, types.float32), (DOUBLES, types.float64)):
        for pair in ((kind, kind), (kind, number), (number, kind)):
            lower_builtin(operation, *pair)(lower)  # type: ignore[no-untyped-call]


def _arithmetic(name: str) -> Callable[..., ir.Value]:
    return lambda builder, x, y: getattr(builder, name)(x, y, flags=_FLAGS)


def _comparison(name: str) -> Callable[..., ir.Value]:
    """One that is false where a number is NaN."""
    return lambda builder, x, y: builder.fcmp_ordered(name, x, y, flags=_FLAGS)


_define(operator.add, None, _arithmetic("fadd"))
_define(operator.sub, None, _arithmetic("fsub"))
_define(operator.mul, None, _arithmetic("fmul"))
_define(operator.truediv, None, _arithmetic("fdiv"))
_define(operator.le, TRUTHS, _comparison("<="))
_define(operator.gt, TRUTHS, _comparison(">"))


def _of_truths(generate_one: Callable[..., ir.Value]) -> Any:
    def function(typing_context: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
            return generate_one(builder, *values)

        return TRUTHS(TRUTHS, TRUTHS), generate

    return _inside(function)


both = _of_truths(lambda builder, x, y: builder.and_(x, y))
alike = _of_truths(lambda builder, x, y: builder.not_(builder.xor(x, y)))


# Functions that rules use in place of Python's ------------------------------------------------------------------


def _unary(name: str) -> Any:
    def function(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
            return _call(builder, f"llvm.{name}.{_suffix(FLOATS.vector)}", FLOATS.vector, values)

        return FLOATS(FLOATS), generate

    return _inside(function)


def _binary(name: str) -> Any:
    def function(typing_context: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
            wide = [_wide(builder, kind, value) for kind, value in zip(kinds.args, values)]
            return _call(builder, f"llvm.{name}.{_suffix(FLOATS.vector)}", FLOATS.vector, wide)

        return FLOATS(x, y), generate

    return _inside(function)


magnitude = _unary("fabs")
root = _unary("sqrt")
with_sign_of = _binary("copysign")


@_inside
def choose(typing_context: Any, condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, else y."""

    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.select(values[0], *(_wide(builder, *pair) for pair in zip(kinds.args[1:], values[1:])))

    return FLOATS(TRUTHS, x, y), generate


@within
def larger(x: Any, y: Any) -> Any:
    """The larger of two, y if x is NaN."""
    return choose(x > y, x, y)


@within
def smaller(x: Any, y: Any) -> Any:
    """The smaller of two, y if x is NaN."""
    return choose(x <= y, x, y)


@_inside
def doubled(typing_context: Any, x: Any) -> Any:
    """The same numbers in float64."""

    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.fpext(values[0], DOUBLES.vector)

    return DOUBLES(FLOATS), generate


def _zeros(kind: _Lanes) -> Any:
    def function(typing_context: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
            return ir.Constant(kind.vector, [0.0] * LANES)

        return kind(), generate

    return _inside(function)


zeros, double_zeros = _zeros(FLOATS), _zeros(DOUBLES)


@_inside
def sum_of(typing_context: Any, x: Any) -> Any:
    """The sum of the sixteen."""

    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        element = x.element
        name = f"llvm.vector.reduce.fadd.{_suffix(x.vector)}"
        return _call(builder, name, element, [ir.Constant(element, 0.0), values[0]])

    return (types.float32 if x is FLOATS else types.float64)(x), generate


@_inside
def largest_of(typing_context: Any, x: Any) -> Any:
    """The largest of the sixteen."""

    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _call(builder, f"llvm.vector.reduce.fmax.{_suffix(FLOATS.vector)}", _FLOAT, values)

    return types.float32(FLOATS), generate


# Memory ---------------------------------------------------------------------------------------------------------


@_inside
def _load(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.load(builder.inttoptr(values[0], FLOATS.vector.as_pointer()), align=4)

    return FLOATS(types.int64), generate


@_inside
def _store(typing_context: Any, address: Any, x: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        builder.store(values[1], builder.inttoptr(values[0], FLOATS.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS), generate


@within
def load(x: Any, i: int) -> Any:
    """Sixteen elements of a float32 array, from a place on."""
    return _load(x.ctypes.data + 4 * i)


@within
def load_at(address: int, i: int) -> Any:
    """The same of an array at an address."""
    return _load(address + 4 * i)


@within
def store(value: Any, x: Any, i: int) -> None:
    """Write sixteen elements of a float32 array."""
    _store(x.ctypes.data + 4 * i, value)


@within
def store_at(value: Any, address: int, i: int) -> None:
    """The same of an array at an address."""
    _store(address + 4 * i, value)


BYTES = ir.VectorType(ir.IntType(8), LANES)


def load_bytes(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Have sixteen bytes loaded from an address."""
    return builder.load(builder.inttoptr(address, BYTES.as_pointer()), align=1)


@_inside
def _load_truths(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.icmp_unsigned("!=", load_bytes(builder, values[0]), ir.Constant(BYTES, [0] * LANES))

    return TRUTHS(types.int64), generate


@_inside
def _store_truths(typing_context: Any, address: Any, x: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, kinds: Any, values: Sequence[ir.Value]) -> ir.Value:
        place = builder.inttoptr(values[0], BYTES.as_pointer())
        builder.store(builder.zext(values[1], BYTES), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, TRUTHS), generate


@within
def load_truths(address: int, i: int) -> Any:
    """Sixteen elements of an array of bytes at an address, each of which is true unless it is 0."""
    return _load_truths(address + i)


@within
def store_truths(truths: Any, address: int, i: int) -> None:
    """Write sixteen bytes, 1 for true and 0 for false."""
    _store_truths(address + i, truths)

"""Codes of momenta, sixteen as one value: bytes, and the two levels of four bits in one (`storage/nibbles.py`)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ....storage.nibbles import LARGEST
from .jit import within
from .lanes import BYTES, FLOATS, LANES, load_bytes

_WHOLE = ir.VectorType(ir.IntType(32), LANES)


def _all(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _read(high: bool) -> Any:
    def function(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            codes = builder.sext(load_bytes(builder, values[0]), _WHOLE)
            if high:
                levels = builder.ashr(builder.add(codes, _all(_WHOLE, 8)), _all(_WHOLE, 4))
            else:
                levels = builder.ashr(builder.shl(codes, _all(_WHOLE, 28)), _all(_WHOLE, 28))
            return builder.sitofp(levels, FLOATS.vector)

        return FLOATS(types.int64), generate

    return intrinsic(function)


def _write(high: bool) -> Any:
    def function(typing_context: Any, address: Any, places: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            codes = load_bytes(builder, values[0])
            of_high = builder.and_(builder.add(codes, _all(BYTES, 8)), _all(BYTES, -16))
            levels = builder.trunc(builder.fptosi(values[1], _WHOLE), BYTES)
            levels = builder.sub(levels, _all(BYTES, LARGEST))
            if high:
                codes = builder.add(builder.sub(codes, of_high), builder.shl(levels, _all(BYTES, 4)))
            else:
                codes = builder.add(of_high, levels)
            builder.store(codes, builder.inttoptr(values[0], BYTES.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, FLOATS), generate

    return intrinsic(function)


@intrinsic
def bytes_as_floats(typing_context: Any, address: Any) -> Any:
    """Sixteen signed bytes at an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return builder.sitofp(builder.sext(load_bytes(builder, values[0]), _WHOLE), FLOATS.vector)

    return FLOATS(types.int64), generate


_read_low, _read_high = _read(False), _read(True)
_write_low, _write_high = _write(False), _write(True)


@within
def read_levels(codes: Any, i: int, high: bool) -> Any:
    """One of the two levels in each of sixteen bytes, from a place on."""
    return _read_high(codes.ctypes.data + i) if high else _read_low(codes.ctypes.data + i)


@within
def write_levels(places: Any, codes: Any, i: int, high: bool) -> None:
    """Put one of the two levels into each of sixteen bytes: numbered from 0 for the lowest one, and cut."""
    if high:
        _write_high(codes.ctypes.data + i, places)
    else:
        _write_low(codes.ctypes.data + i, places)

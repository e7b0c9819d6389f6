"""numba, as all kernels here use it: compiled once, kept on disk, free of Python's lock, and reading raw addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Sums may be taken in any order, so that they vectorize, and products may be added without being rounded first. Not
# among these freedoms: that no number is NaN or infinite, because unusable gradients are recognized by that.
FAST = {"reassoc", "contract", "nsz"}


def jit(function: _Function) -> _Function:
    """Compile arithmetic for other kernels; results are as exact as float32, and not to the last bit."""
    return _compiled(function, fastmath=FAST, **_INNER)


def within(function: _Function) -> _Function:
    """The same of what is to be put in place of every call: of lanes, which no call could pass in registers."""
    return _compiled(function, fastmath=FAST, forceinline=True, **_INNER)


def inlined(function: _Function) -> _Function:
    """Put in place of every call before anything is compiled, with the exactness of the function that calls.

    What a function calls is compiled with it once more: a large one that is called in one place is better a part of the
    caller. But a loop over arrays stays a function of few of them, so that LLVM can tell that they do not overlap.
    """
    return numba.njit(inline="always")(function)  # type: ignore[return-value]


def exact(function: _Function) -> _Function:
    """Compile for other kernels what rounds every operation as written, so that it gives the same bits everywhere."""
    return _compiled(function, fastmath=set(), **_INNER)


def entry(function: _Function) -> _Function:
    """Compile a kernel that Python calls."""
    return _compiled(function, fastmath=FAST)


# Without what Python would need to call them: that takes as long to compile as they themselves.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _compiled(function: _Function, **options: Any) -> _Function:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # There is no folder that a result could be kept in.
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    with suppress(AttributeError):
        # numba keeps a result until its own file changes; a kernel is also made of the files that it calls.
        compiled._cache._cache_file._source_stamp = _sources()
    return compiled  # type: ignore[no-any-return]


@cache
def _sources() -> str:
    """What tells these files from those of any other version."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parents[2] / "context" / "cpu_samples.py"]
    texts = [path.read_bytes() for path in files]
    return hashlib.blake2b(b"".join(texts), digest_size=16).hexdigest()


def _pointer_to(element: types.Type) -> Any:
    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(element).as_pointer())

        return types.CPointer(element)(types.int64), generate  # type: ignore[no-untyped-call]

    return pointer


def _bits_as(result: types.Type, argument: types.Type) -> Any:
    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(argument), generate

    return cast


as_float = _bits_as(types.float32, types.uint32)
as_bits = _bits_as(types.uint32, types.float32)

_float64 = _pointer_to(types.float64)
_int64 = _pointer_to(types.int64)
_float32 = _pointer_to(types.float32)
_uint8 = _pointer_to(types.uint8)
_int8 = _pointer_to(types.int8)
_uint16 = _pointer_to(types.uint16)


@jit
def floats(address: int, start: int, count: int) -> Any:
    """`count` float32 numbers from the one numbered `start` on, in place."""
    return numba.carray(_float32(address + 4 * start), count)


@jit
def halves(address: int, start: int, count: int) -> Any:
    """Likewise uint16."""
    return numba.carray(_uint16(address + 2 * start), count)


@jit
def bytes_at(address: int, start: int, count: int) -> Any:
    """Likewise uint8."""
    return numba.carray(_uint8(address + start), count)


@jit
def signed_bytes(address: int, start: int, count: int) -> Any:
    """Likewise int8."""
    return numba.carray(_int8(address + start), count)


def _generate_prefetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, kind, "llvm.prefetch.p0"
        )
        # To read, into the second cache, as data.
        builder.call(function, [pointer, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


_prefetch: Any = intrinsic(_generate_prefetch)


@within
def fetch(x: Any, i: int) -> None:
    """Begin to fetch a float32 array's elements around one, which may be beyond its end, and do not wait for them."""
    _prefetch(x.ctypes.data + 4 * i)


@jit
def prefetch(address: int, size: int) -> None:
    """Begin to fetch so many bytes from memory, and do not wait for them."""
    for place in range(address, address + size, 64):
        _prefetch(place)


# Arrays that own memory are counted by numba at every call and slice, which takes longer than a rule takes for a block.
# What comes in is therefore seen through arrays that own nothing, like all of the above.


@jit
def plain_floats(x: Any) -> Any:
    """A float32 array as one that owns nothing."""
    return numba.carray(_float32(x.ctypes.data), x.shape)


@jit
def plain_bytes(x: Any) -> Any:
    """A uint8 array as one that owns nothing."""
    return numba.carray(_uint8(x.ctypes.data), x.shape)


@jit
def plain_doubles(x: Any) -> Any:
    """A float64 array as one that owns nothing."""
    return numba.carray(_float64(x.ctypes.data), x.shape)


@jit
def plain_numbers(x: Any) -> Any:
    """An int64 array as one that owns nothing."""
    return numba.carray(_int64(x.ctypes.data), x.shape)

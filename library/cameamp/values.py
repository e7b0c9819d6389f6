"""The types that an option can have, each as the check of one value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

# Takes an option's name, its value and its default, and returns the value as the option's own type. Raises TypeError
# for another type, ValueError for a number that is not finite; with the name, the value, and what is allowed.
Check = Callable[[str, Any, Any], Any]

# Above this, a float cannot represent every whole number.
_LARGEST_INTEGER = 2**53


def truth(name: str, value: Any, default: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"option '{name}' is {value!r}; allowed: True or False")
    return value


def truth_or_auto(name: str, value: Any, default: Any) -> bool | str:
    """True, False or "auto"."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "auto"):
        raise TypeError(f"option '{name}' is {value!r}; allowed: True, False or 'auto'")
    return value


def number(name: str, value: Any, default: Any) -> float:
    """A finite number, also as a tensor of one element or an array of no dimensions."""
    is_single = getattr(value, "shape", None) == () or (hasattr(value, "numel") and value.numel() == 1)
    return _number(name, value.item() if is_single else value, "a finite number")


def whole_number(name: str, value: Any, default: Any) -> int:
    """A whole number."""
    return _whole_number(name, value, "a whole number")


def three_numbers(name: str, value: Any, default: Sequence[Any]) -> tuple[float, ...]:
    """Three finite numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"option '{name}' is {value!r}; allowed: three numbers, for example {_example(default)}")
    return tuple(_number(name, item, "three finite numbers") for item in value)


def whole_numbers(name: str, value: Any, default: Sequence[Any]) -> tuple[int, ...]:
    """Any number of whole numbers."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"option '{name}' is {value!r}; allowed: whole numbers, for example {_example(default)}")
    return tuple(_whole_number(name, item, "whole numbers") for item in value)


def _example(default: Sequence[Any]) -> str:
    """A default with the brackets that Python and TOML both read."""
    return str(list(default))


def _number(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"option '{name}' is {value!r}; allowed: {allowed}")
    try:
        as_float = float(value)
    except OverflowError:  # A whole number of more than 308 digits.
        as_float = math.inf
    if not math.isfinite(as_float):
        raise ValueError(f"option '{name}' is {value!r}; allowed: {allowed}")
    return as_float


def _whole_number(name: str, value: Any, allowed: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"option '{name}' is {value!r}; allowed: {allowed}")
    as_int = int(value)
    if abs(as_int) > _LARGEST_INTEGER:
        raise ValueError(f"option '{name}' is too large; allowed: {allowed} up to {_LARGEST_INTEGER}")
    return as_int

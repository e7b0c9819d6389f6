"""Options as people write them: `key=value` words, and the spelling of names."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Iterable
from typing import Any

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The words `, did you mean 'x'?` for the known name nearest to `name`, or nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def check_names(options: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for options that do not exist, with the one nearest to one of them, or all if none is near."""
    unknown = [name for name in options if name not in known]
    for name in unknown:
        nearest = nearest_name(name, known)
        if nearest:
            raise TypeError(f"unknown option '{name}'{nearest}")
    if unknown:
        # What another optimizer takes comes in numbers, and is to be taken out in one go.
        listed = ", ".join(f"'{name}'" for name in unknown)
        raise TypeError(f"unknown option{'s' * (len(unknown) > 1)} {listed}. Known options: {', '.join(known)}.")


def check_group_names(group: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for a key of a parameter group that looks like a misspelt option.

    Groups also carry what others put there (`params`, `initial_lr`, a label), so a key is refused only if an option
    of nearly the same name exists.
    """
    for name in group:
        if name not in known and name not in ("params", "param_names", "initial_lr"):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if close:
                raise TypeError(f"unknown option '{name}', did you mean '{close[0]}'?")


def parse_optimizer_args(words: Iterable[str]) -> dict[str, Any]:
    """Read sd-scripts' `--optimizer_args key=value ...`: Python literals, as the host itself reads them.

    A value of several numbers needs no brackets, and then no blanks, at which some programs split the words.

    Raises:
        ValueError: a word without `=`, a value that is not a Python literal, or a name that comes twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"optimizer_args: '{word}' has no '='; options are written key=value")
        if name in options:
            raise ValueError(f"optimizer_args: '{name}' stands there twice; keep one")
        if text[:1] in _CLOSING and _CLOSING[text[:1]] not in text:
            raise ValueError(
                f"optimizer_args: the value of '{name}' is {text!r}, cut off at a blank; "
                "write it without brackets and blanks, such as betas=0.8,0.99,0.999"
            )
        try:
            options[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise ValueError(
                f"optimizer_args: the value of '{name}' is {text!r}; "
                "allowed: a Python literal such as 0.5, True or (0.8, 0.99, 0.999)"
            ) from None
    return options

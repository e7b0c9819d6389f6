"""Functions of tensors through torch.compile, in the steps of optimizers that ask for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Graphs of one function; torch allows eight. There is one for each phase, with and without what a stack may have.
_MOST_GRAPHS = 64


class Compiler:
    """Compiles what groups of one optimizer run, and gives up at the first failure, with one warning."""

    def __init__(self) -> None:
        self.works = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around the work on a group: functions that are given to `run` are compiled."""
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.6
        token = _active.set(self)
        try:
            with config.patch({limit: _MOST_GRAPHS}):
                yield
        finally:
            _active.reset(token)


_active: ContextVar[Compiler | None] = ContextVar("compiler", default=None)


def is_active() -> bool:
    """Whether `run` compiles; for what it would cost to prepare."""
    compiler = _active.get()
    return compiler is not None and compiler.works


def run(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What a function returns when it runs compiled.

    Args:
        function: takes and returns tensors, and depends on no number that changes with the step.

    Returns:
        None where nothing is to be compiled, or compiling failed; nothing of the function has run then.
    """
    compiler = _active.get()
    if compiler is None or not compiler.works:
        return None
    try:
        return _compiled(function)(*arguments, **more)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        compiler.works = False
        reason = str(error).strip().partition("\n")[0]
        logger.warning("fused: compiling failed, the rules run uncompiled from here on: %s", reason)
        return None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)

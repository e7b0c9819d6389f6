"""Threads for kernels: as many as torch may use, each taking the next share of the work when it has done one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy
import torch

# The first shares are large, because each costs a call, and the last ones small, so that all threads end together: half
# of what is left for each thread, and no less than this part of a thread's work.
_SMALLEST_SHARE = 1 / 32


def spread(function: Callable[[int, int], Any], sizes: numpy.ndarray) -> None:
    """Call a function on ranges of items, on several threads; it must not need Python's lock for long.

    Args:
        function: of the first item, and the one after the last.
        sizes: how much work each item is, large ones first.

    Raises:
        Whatever one of the calls raises, once all have ended.
    """
    threads = min(torch.get_num_threads(), len(sizes))
    if threads <= 1:
        function(0, len(sizes))
        return
    ends = numpy.cumsum(sizes)
    cuts = numpy.searchsorted(ends, ends[-1] * _shares(threads)) + 1
    waiting = deque(pairwise(sorted({0, *cuts.tolist(), len(sizes)})))

    def work() -> None:
        while True:
            try:
                first, last = waiting.popleft()
            except IndexError:
                return
            function(first, last)

    others = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


@cache
def _shares(threads: int) -> numpy.ndarray:
    """Where the shares end, as parts of all work."""
    ends = [0.0]
    while ends[-1] < 1:
        ends.append(ends[-1] + max((1 - ends[-1]) / 2, _SMALLEST_SHARE) / threads)
    return numpy.array(ends[1:-1])


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="cameamp")

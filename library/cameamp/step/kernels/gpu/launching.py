"""Launches Triton's kernels. Nothing here imports Triton, which not everybody has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Older versions know no records among what a kernel is compiled for.
_OLDEST_TRITON = (3, 4)


def require_triton() -> None:
    """Raise ImportError, saying what is missing, where kernels cannot be compiled."""
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        raise ImportError(f"Triton {triton.__version__} is too old for these kernels: {oldest} or newer is needed")


class Launcher:
    """Launches kernels, and counts them.

    Attributes:
        launches: how many kernels were launched so far.
    """

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
        """Run a kernel.

        Args:
            kernel: the function.
            programs: how many of it; nothing is launched for none.
            arguments: its own.
            warps: of each program.
            constants: what it is compiled for.
        """
        if programs > 0:
            self.launches += 1
            # Products and sums are not fused: codes are to be the same on every device.
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context around launches: Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)

"""Launches kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


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

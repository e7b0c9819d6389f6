"""The same elements of all parameters at every step: what stands for a gradient that is too large to keep.

Every n-th element of each tensor, so that tensors count in proportion to their size. n shares no factor with the number
of elements of any of them, and so meets all rows and columns alike without any indices to keep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import gcd

import torch
from torch import Tensor

from ..devices import moved
from ..stacks.stack import Stack

LARGEST_SAMPLE = 65_536


class Sampler:
    """Where the sampled elements of each parameter lie in one vector, whichever of them a step has gradients for.

    Args:
        sizes: element counts of the optimizer's parameters, in its order.

    Attributes:
        every: distance between sampled elements of a parameter.
        starts: for each parameter, and one past the last, where its elements begin in the vector.
        size: length of the vector.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        # Each parameter may give one element more than its share.
        room = max(LARGEST_SAMPLE - len(sizes), LARGEST_SAMPLE // 2)
        self.every = _coprime_from(-(-sum(sizes) // room), {size for size in sizes if size > 1})
        self.starts = [0]
        for size in sizes:
            self.starts.append(self.starts[-1] - (-size // self.every))
        self.size = self.starts[-1]
        self._places: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    def gather(self, stacks: Sequence[Stack], pieces: Sequence[Tensor]) -> Tensor:
        """One vector, (size,) float32 on the first stack's device; 0 for elements that are in no stack here.

        Args:
            stacks: the stacks of all groups that take this step.
            pieces: what was taken of each, at every `every`-th element, 2-d; or the vector, with that in its places.
        """
        device = stacks[0].device
        whole = {id(piece): piece for piece in pieces if piece.ndim == 1}
        apart = [(stack, piece) for stack, piece in zip(stacks, pieces) if piece.ndim > 1]
        if len(whole) == 1 and not apart:
            return pieces[0]
        vector = torch.zeros(self.size, dtype=torch.float32, device=device)
        for piece in whole.values():
            vector += moved(piece, device)
        if apart:
            flat = torch.cat([moved(piece.flatten(), device) for _, piece in apart])
            vector.index_copy_(0, self._places_of([stack for stack, _ in apart], device), flat)
        return vector

    def part_of(self, stack: Stack, piece: Tensor) -> Tensor:
        """What a stack has of a piece, (tensors, elements), as of `gather`."""
        if piece.ndim > 1:
            return piece
        first, end = self._share_of(stack)
        return torch.stack([piece[self.starts[n] + first : self.starts[n] + end] for n in stack.parameter_numbers])

    def _places_of(self, stacks: Sequence[Stack], device: torch.device) -> Tensor:
        """Where the pieces go. Usually the same stacks come again, so the last answer is cached."""
        key = tuple([stack.parameter_numbers for stack in stacks])
        places = self._places.get(key)
        if places is None or places.device != device:
            ranges = [
                torch.arange(self.starts[n] + first, self.starts[n] + end, device="cpu")
                for stack in stacks
                for first, end in [self._share_of(stack)]
                for n in stack.parameter_numbers
            ]
            places = moved(torch.cat(ranges), device)
            self._places = {key: places}
        return places

    def _share_of(self, stack: Stack) -> tuple[int, int]:
        """The first of a parameter's samples that a stack holds, and the one after the last."""
        first, end = stack.first_element, stack.first_element + stack.rows * stack.columns
        return -(-first // self.every), -(-end // self.every)


def _coprime_from(number: int, sizes: Collection[int]) -> int:
    """The smallest whole number not below another, and at least 1, that shares no factor with some sizes."""
    number = max(number, 1)
    while any(gcd(number, size) > 1 for size in sizes):
        number += 1
    return number

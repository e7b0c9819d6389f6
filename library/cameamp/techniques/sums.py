"""Sums over whole tensors. A stack may hold a part of each of its tensors; then another class adds the parts up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sums:
    """Sums over the tensors of a stack that holds them whole.

    Example:
        >>> stack = torch.tensor([[[3.0], [4.0]]])
        >>> OF_WHOLE_TENSORS.numel(stack), OF_WHOLE_TENSORS.norms(stack).tolist()
        (2, [5.0])
    """

    def numel(self, stack: Tensor) -> int:
        """The number of elements of each tensor of a stack (tensors, rows, columns)."""
        return stack[0].numel()

    def norms(self, stack: Tensor) -> Tensor:
        """The norm of each tensor of a stack (tensors, rows, columns): (tensors,)."""
        norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
        return norms

    def scaled_by(self, factor: Tensor) -> None:
        """The stack whose norms were asked for is now (tensors,) factors times what it was."""

    def of_momenta(self, target: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        """What an update of multi-scale momenta towards a stack takes of whole tensors, where shards have them.

        Returns:
            The sums, of what the stack was when its norms were asked for; and its factor since then, if there is one.
        """
        raise NotImplementedError("whole tensors have all that their momenta need")

    def over_rows(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums that were taken over rows, of whatever shape."""
        return parts

    def norms_and_products(self, x: Tensor, y: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """|x|, |y| and x . y of the tensors of two stacks (tensors, elements): (tensors, 1) each."""
        norms = _norms(x), _norms(y)
        products = torch.mul(x, y, out=None if scratch is None else scratch.view_as(x))
        return *norms, products.sum(dim=1, keepdim=True)

    def norms_of_rest(self, rest: Tensor) -> Tensor:
        """After `norms_and_products`, the norms of what is left of x, (tensors, elements), without its part along y."""
        return _norms(rest)

    def counts(self, ones: Tensor) -> Tensor:
        """The sum of each tensor of zeros and ones of a stack (tensors, rows, columns): (tensors, 1, 1)."""
        return ones.sum(dim=(1, 2), keepdim=True)


OF_WHOLE_TENSORS = Sums()


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norms

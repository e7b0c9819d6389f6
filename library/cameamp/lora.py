"""Which parameters are LoRA factors: decided by their names if these are known, otherwise by their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

# kohya, with the core of a Tucker decomposition; diffusers and peft; LyCORIS, whose GLoRA has very short names.
_FACTOR_NAME = re.compile(
    r"(^|[._])(lora_down|lora_mid|lora_up|lora_A|lora_B|hada_\w+|lokr_\w+)([._]|$)"
    r"|(^|[._])(lycoris|lora)_\w+\.(a1|a2|b1|b2)(\.|$)"
)


def is_factor_name(name: str) -> bool:
    """Whether a parameter of this name is a LoRA factor."""
    return _FACTOR_NAME.search(name) is not None


def find_factors(groups: Sequence[Sequence[Tensor]], names: Mapping[Tensor, str]) -> set[Tensor]:
    """The LoRA factors among an optimizer's parameters.

    If the name of a parameter is known, it decides. The parameters without a known name are judged together, by their
    shapes: they are LoRA factors if all of them are matrices and form low-rank pairs.

    Args:
        groups: the parameters of each group, in order.
        names: the names of the parameters, as far as they are known.

    Returns:
        The factors to which ALLoRA applies: matrices, and convolution kernels seen as matrices.
    """
    named = {p for group in groups for p in group if p in names and p.ndim >= 2 and is_factor_name(names[p])}
    nameless = [[p for p in group if p not in names] for group in groups]
    if _all_in_pairs(nameless):
        named.update(p for group in nameless for p in group)
    return named


def _all_in_pairs(groups: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all parameters form low-rank pairs: a down (r x in) and an up (out x r) with r below in and out.

    The two factors of a pair follow each other in a group, as every LoRA library registers them. With LoRA+ they are
    the n-th down of the groups of downs and the n-th up of the groups of ups.

    The two matrices of a transformer's feed-forward layer are no pair, because they widen first and narrow then; and
    nothing is a pair if there is a bias among the parameters. One model that is no LoRA has the shapes of one: an
    autoencoder without biases that narrows and then widens. For such a model, name the parameters or set full_finetune.
    """
    if any(_as_matrix(p) is None for group in groups for p in group):
        return False
    shapes = [[shape for p in group if (shape := _as_matrix(p)) is not None] for group in groups if group]
    matrices = [shape for group in shapes for shape in group]
    return _paired(_by_neighbours(matrices)) or _paired(_by_order(shapes))


_Shape = tuple[int, int]
_Pairs = list[tuple[_Shape, _Shape]]


def _by_neighbours(matrices: Sequence[_Shape]) -> _Pairs:
    if len(matrices) % 2:
        return []
    return list(zip(matrices[::2], matrices[1::2]))


def _by_order(groups: Sequence[Sequence[_Shape]]) -> _Pairs:
    """Pairs of LoRA+, whose groups have either only downs or only ups."""
    wide = [shape for group in groups if all(rows <= columns for rows, columns in group) for shape in group]
    tall = [shape for group in groups if not all(rows <= columns for rows, columns in group) for shape in group]
    if len(wide) != len(tall):
        return []
    return list(zip(wide, tall))


def _paired(pairs: _Pairs) -> bool:
    """Whether the two factors of each pair have the same rank, and most ranks are low.

    A thin layer, such as one with the 4 channels of a latent, can be narrower than the rank, so a few pairs need not be
    of low rank.
    """
    if not pairs or any(down[0] != up[1] for down, up in pairs):
        return False
    low = sum(down[0] < min(down[1], up[0]) for down, up in pairs)
    return low * 2 > len(pairs)


def _as_matrix(p: Tensor) -> _Shape | None:
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim in (2, 4) and p.numel() > 0 else None

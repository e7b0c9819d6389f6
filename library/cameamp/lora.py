"""Which parameters are LoRA factors: by name where names are known, else by structure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

# kohya; diffusers and peft; LyCORIS.
_FACTOR_NAME = re.compile(r"(^|[._])(lora_down|lora_up|lora_A|lora_B|hada_\w+|lokr_\w+)([._]|$)")


def is_factor_name(name: str) -> bool:
    """Whether a parameter of this name is a LoRA factor."""
    return _FACTOR_NAME.search(name) is not None


def find_factors(groups: Sequence[Sequence[Tensor]], names: Mapping[Tensor, str]) -> set[Tensor]:
    """The LoRA factors among an optimizer's parameters.

    Parameters with a name are judged by it. Those without are judged together by their shapes: they are LoRA factors
    when every one of them is a matrix and all form low-rank pairs.

    Args:
        groups: the parameters of each group, in order.
        names: the names of those parameters whose names are known.

    Returns:
        The factors that ALLoRA applies to: matrices, and convolution kernels seen as matrices.
    """
    named = {p for group in groups for p in group if p in names and p.ndim >= 2 and is_factor_name(names[p])}
    nameless = [[p for p in group if p not in names] for group in groups]
    if _all_in_pairs(nameless):
        named.update(p for group in nameless for p in group)
    return named


def _all_in_pairs(groups: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all parameters form low-rank pairs: a down (r x in) and an up (out x r) with r below in and out.

    Pairs are neighbours within a group, as every LoRA library registers them, or, with LoRA+, the n-th down of the
    groups that hold downs and the n-th up of the groups that hold ups. A bottleneck of r features is no pair when it
    stands the wrong way around, as in a transformer's feed-forward layer; nor is anything beside a bias. What shapes
    cannot tell apart is a bias-free autoencoder that narrows and widens again: name its parameters, or set
    full_finetune.
    """
    shapes = [[_as_matrix(p) for p in group] for group in groups if len(group) > 0]
    matrices = [shape for group in shapes for shape in group]
    if not matrices or any(shape is None for shape in matrices):
        return False
    return _paired(_by_neighbours(matrices)) or _paired(_by_order(shapes))


_Shape = tuple[int, int]
_Pairs = list[tuple[_Shape, _Shape]]


def _by_neighbours(matrices: list) -> _Pairs:
    if len(matrices) % 2:
        return []
    return list(zip(matrices[::2], matrices[1::2]))


def _by_order(groups: list) -> _Pairs:
    """Downs and ups of LoRA+, whose groups hold only the ones or only the others."""
    wide = [shape for group in groups if all(rows <= columns for rows, columns in group) for shape in group]
    tall = [shape for group in groups if not all(rows <= columns for rows, columns in group) for shape in group]
    if len(wide) != len(tall):
        return []
    return list(zip(wide, tall))


def _paired(pairs: _Pairs) -> bool:
    """Whether each pair shares its rank, and the rank is low.

    A thin layer (the 4 channels of a latent, say) can be narrower than the rank, so a few pairs may not be low.
    """
    if not pairs or any(down[0] != up[1] for down, up in pairs):
        return False
    low = sum(down[0] < min(down[1], up[0]) for down, up in pairs)
    return low * 2 > len(pairs)


def _as_matrix(p: Tensor) -> _Shape | None:
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim in (2, 4) and p.numel() > 0 else None

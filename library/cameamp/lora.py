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
    shapes: either all of them belong to a LoRA, or none does.

    Args:
        groups: the parameters of each group, in order.
        names: the names of the parameters, as far as they are known.

    Returns:
        The factors to which ALLoRA applies: matrices, and convolution kernels seen as matrices.
    """
    named = {p for group in groups for p in group if p in names and p.ndim >= 2 and is_factor_name(names[p])}
    found, certain = _by_shapes(_nameless(groups, names))
    return named | found if certain else named


def why_none(groups: Sequence[Sequence[Tensor]], names: Mapping[Tensor, str]) -> str:
    """Why parameters without names that may be LoRA factors are not taken for ones; "" if there are none."""
    nameless = _nameless(groups, names)
    found, _ = _by_shapes(nameless)
    if found:
        return "a model's own layers can have these shapes"
    found, _ = _by_shapes([[p for p in group if p.ndim != 1] for group in nameless])
    return "vectors beside low-rank pairs may be biases" if found else ""


def _nameless(groups: Sequence[Sequence[Tensor]], names: Mapping[Tensor, str]) -> list[list[Tensor]]:
    return [[p for p in group if p not in names] for group in groups]


def _by_shapes(groups: Sequence[Sequence[Tensor]]) -> tuple[set[Tensor], bool]:
    """The factors, if all parameters have the shapes of LoRAs or LoHas, with or without DoRA's magnitudes as matrices.

    With a vector among them nothing is a factor: it may be a bias, and has the shape that a magnitude has in peft.

    Returns:
        The factors, and whether they are certain. LoHas and magnitudes are not if no layer has more or fewer inputs
        than outputs: residual blocks look the same.
    """
    params = [p for group in groups for p in group]
    if not all(_is_matrix(p) for p in params):
        return set(), False
    if _all_in_pairs(groups):
        return set(params), True
    fours = _modules(params, 4)
    if _are_loha(fours):
        return set(params), any(map(_narrows, fours))
    # OneTrainer and LyCORIS have the magnitude before the pair, LyCORIS's LoHa has it after its four factors.
    for length, place, fit in ((3, 0, _are_pairs), (5, 4, _are_loha)):
        modules = _modules(params, length)
        magnitudes = [module[place] for module in modules]
        factors = [[*module[:place], *module[place + 1 :]] for module in modules]
        if fit(factors) and all(map(_is_magnitude, magnitudes, factors)):
            # One alone may be three layers in a row, the first of which takes in a single number.
            uneven = any(down.shape[1] != up.shape[0] for down, up in map(_down_and_up, factors))
            return {p for module in factors for p in module}, uneven and len(modules) > 1
    return set(), False


_Shape = tuple[int, int]
_Pairs = Sequence[tuple[_Shape, _Shape]]
_Module = Sequence[Tensor]


def _modules(params: Sequence[Tensor], length: int) -> list[_Module]:
    """The parameters, in order, cut into modules of this length; none if something would be left over."""
    if len(params) % length:
        return []
    return [params[start : start + length] for start in range(0, len(params), length)]


def _are_pairs(modules: Sequence[_Module]) -> bool:
    return _paired([(_as_matrix(down), _as_matrix(up)) for down, up in modules])


def _are_loha(modules: Sequence[_Module]) -> bool:
    """Whether each is two products of the same shapes, (out x r) (r x in), with r below in and out in most of them."""
    if any(p.ndim != 2 for module in modules for p in module):
        return False
    fours = [[_as_matrix(p) for p in module] for module in modules]
    return all(four[:2] == four[2:] for four in fours) and _paired([(right, left) for left, right, _, _ in fours])


def _narrows(four: _Module) -> bool:
    """Whether a LoHa is of a layer with fewer outputs than inputs, as some layer of every model is.

    The feed-forward layers of transformers have the shapes of LoHas too: they widen, and narrow then. But the second
    takes in what the first puts out, or half of it if the other half is a gate.
    """
    down, up = _down_and_up(four)
    return up.shape[0] < down.shape[1]


def _is_magnitude(p: Tensor, factors: _Module) -> bool:
    """Whether it has one element for each output or each input of its factors' layer, as a matrix or a kernel."""
    down, up = _down_and_up(factors)
    if p.shape[0] == p.numel():
        return p.numel() == up.shape[0]
    return p.shape[1] == p.numel() and _as_matrix(down)[1] % p.numel() == 0


def _down_and_up(factors: _Module) -> tuple[Tensor, Tensor]:
    """Of a LoRA its two factors, of a LoHa the first two of its four, which come the other way round."""
    return (factors[0], factors[1]) if len(factors) == 2 else (factors[1], factors[0])


def _all_in_pairs(groups: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all parameters form low-rank pairs: a down (r x in) and an up (out x r) with r below in and out.

    The two factors of a pair follow each other in a group, as every LoRA library registers them. With LoRA+ they are
    the n-th down of the groups of downs and the n-th up of the groups of ups.

    The two matrices of a transformer's feed-forward layer are no pair, because they widen first and narrow then; and
    nothing is a pair if there is a bias among the parameters. One model that is no LoRA has the shapes of one: an
    autoencoder without biases that narrows and then widens. For such a model, name the parameters or set full_finetune.
    """
    shapes = [[_as_matrix(p) for p in group] for group in groups if group]
    matrices = [shape for group in shapes for shape in group]
    return _paired(_by_neighbours(matrices)) or _paired(_by_order(shapes))


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


def _is_matrix(p: Tensor) -> bool:
    return p.ndim in (2, 4) and p.numel() > 0


def _as_matrix(p: Tensor) -> _Shape:
    return p.shape[0], p.numel() // p.shape[0]

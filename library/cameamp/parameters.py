"""An optimizer's parameters as a whole: their order, their names, and which of them are LoRA factors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from . import lora
from .sharding import Alone, Cut, Processes, cut_of, processes_of

logger = logging.getLogger(__name__)


# Modules whose tensor classes hold weights as codes: adding a step to one changes nothing. Those that are made for
# training are elsewhere, in torchao.prototype.
_QUANTIZED = ("optimum.quanto", "torchao.quantization", "torchao.dtypes", "bitsandbytes.nn")


def check_parameters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError if a group has a parameter twice, or one that is to be trained and cannot be.

    Args:
        params: the group's parameters.
        names: their names, or none.
    """
    if len(set(params)) < len(params):
        raise ValueError(
            "lists a parameter twice, which would be updated twice; allowed: each parameter once, also where modules "
            "share it"
        )
    for number, p in enumerate(params):
        kind = type(p)
        if p.requires_grad and kind.__module__.startswith(_QUANTIZED):
            label = f"parameter '{names[number]}'" if names else f"parameter {number}"
            raise ValueError(
                f"{label} of shape {tuple(p.shape)} is quantized ({kind.__module__.partition('.')[0]}'s "
                f"{kind.__name__}), and no step can change it; train a LoRA beside it, or the weights before quantizing"
            )


class Named(Protocol):
    """A parameter group. Names go by place, because a wrapper that shards parameters replaces them.

    Attributes:
        names: the names of its parameters; "" for one that is not known.
    """

    names: list[str]

    @property
    def params(self) -> list[Tensor]:
        """Its parameters."""


def names_of(groups: Sequence[Named]) -> dict[Tensor, str]:
    """The names of the parameters whose names are known."""
    return {p: name for group in groups for p, name in zip(group.params, group.names) if name}


# So many parameters of one block may be in another order than that in which the model uses them.
_NEAR = 8


class Parameters:
    """What is known of all parameters together, once `locate` has looked.

    It keeps no groups: these keep it, and an optimizer out of use would wait for the garbage collector.

    Attributes:
        factors: the LoRA factors.
        processes: those that hold the parameters.
        two_largest: how many elements the two largest of those that are trained have together.
        located: another object each time that they were looked at; None before.
    """

    def __init__(self) -> None:
        self.forget(log_again=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"of": "all"}  # Something that is true, or nothing would be restored.

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.forget(log_again=True)

    def __len__(self) -> int:
        return len(self._positions)

    def forget(self, log_again: bool = False) -> None:
        """Let `locate` look again, and log what it finds if it has changed or, with `log_again`, in any case."""
        self.factors: set[Tensor] = set()
        self.located: object = None
        self._positions: dict[Tensor, int] = {}
        self._cuts: dict[Tensor, Cut] = {}
        self.processes: Processes = Alone()
        self.two_largest = 0
        self._largest_before: dict[Tensor, int] = {}
        if log_again:
            self._logged: tuple[int, int] | None = None

    def locate(self, named: Sequence[Named]) -> None:
        """Look at the parameters of each group, unless they are known."""
        if self._positions:
            return
        self.located = object()
        groups, names = [group.params for group in named], names_of(named)
        self.factors = lora.find_factors(groups, names)
        parameters = [p for group in groups for p in group]
        self._positions = {p: position for position, p in enumerate(parameters)}
        self.processes = processes_of(parameters)
        trained = [p for p in parameters if p.requires_grad]
        sizes = [p.numel() for p in trained]
        self.two_largest = sum(sorted(sizes)[-2:])
        self._largest_before = {
            p: max(sizes[max(0, place - _NEAR) : place], default=0) for place, p in enumerate(trained)
        }
        alike: dict[Cut, Cut] = {}  # One object for equal cuts, which are compared at every step.
        self._cuts = {p: alike.setdefault(cut, cut) for p in parameters for cut in [cut_of(p)]}
        count, total = len(self.factors), len(self._positions)
        if (count, total) != self._logged:
            self._logged = (count, total)
            if count:
                logger.info("%d of %d parameters are LoRA factors: ALLoRA is on, unless full_finetune", count, total)
            else:
                doubt = lora.why_none(groups, names)
                why = f" ({doubt}; set_parameter_names decides)" if doubt else ""
                logger.info("none of %d parameters is a LoRA factor: ALLoRA is off%s", total, why)

    def __contains__(self, p: Tensor) -> bool:
        return p in self._positions

    def position(self, p: Tensor) -> int:
        """The parameter's number in the optimizer."""
        return self._positions[p]

    def elements_after(self, p: Tensor) -> int:
        """How many elements the gradient that comes after its gradient in a backward pass has, probably at most.

        Gradients come in about the reverse of the parameters' order; within a block of a model in any.
        """
        return self._largest_before.get(p, self.two_largest)

    def cut(self, p: Tensor) -> Cut:
        """Which part of the parameter this process holds."""
        return self._cuts.get(p) or cut_of(p)

"""The rules of a step as compiled graphs: states go in and come out as float32 stacks, however they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compiling
from ..stacks.layout import LARGEST_STACK
from ..stacks.workspace import Work
from ..states import TABLE
from ..techniques import multiscale
from .measure import FirstPass, drop_unusable_, first_pass
from .rules import (
    StackOptions,
    States,
    StatesAndMomenta,
    StepScalars,
    Watched,
    move_,
    scale_gradient_,
    take_step_,
)

# A graph takes and gives a dozen stacks in the early phase; with larger ones a step would need more memory than it may.
# There is little to gain either: one operation on so many elements keeps a device busy for long.
_LARGEST = LARGEST_STACK // 2


# The new weights, and what the context sees.
_Done = tuple[Tensor, Watched | None]


def fused_first_pass(g: Tensor, with_deviations: bool, watch_every: int) -> FirstPass:
    """As `measure.first_pass`, except that unusable elements of `g` may stay in it."""
    found = compiling.run(_first_pass, g, with_deviations, watch_every) if g.numel() <= _LARGEST else None
    return first_pass(g, with_deviations, watch_every) if found is None else found


def fused_step(
    g: Tensor,
    states: StatesAndMomenta,
    magnitude_sum: Tensor,
    decay_strengths: Tensor | None,
    multiplier: Tensor | None,
    work: Work,
    scalars: StepScalars,
    options: StackOptions,
) -> tuple[Tensor, Watched | None]:
    """As `rules.take_step_`, of any gradients: a graph for each combination of phase and options, whatever the shapes.

    Around multi-scale momenta, whose products of thin matrices cannot be merged with anything, it is two graphs. Of
    `work` they use only what the weights are gathered into: what lies in between they keep in registers.
    """
    in_first = {"magnitude_sum": magnitude_sum}
    in_second = {"decay_strengths": decay_strengths, "multiplier": multiplier}
    own = tuple(state.name for state in TABLE if state.lives(options.phase, options.config.came))
    done: _Done
    if not scalars.scales:
        names = ("weights", *own)
        done = _run(_take_step_, {"g": g}, states, names, work, scalars, options, **in_first, **in_second)
    else:
        first = tuple(name for name in own if name == "exp_avg_sq")
        second = ("weights", *(name for name in own if name != "exp_avg_sq"))
        sg, direction = _run(_scale_gradient_, {"g": g}, states, first, work, scalars, options, **in_first)
        drive = multiscale.multi_scale_momentum(sg, direction, states, scalars.scales)
        in_second |= {"direction": direction, "drive": drive}
        done = _run(move_, {"sg": sg}, states, second, work, scalars, options, **in_second)
    return done


def _run(
    rules: Callable[..., Any],
    overwritten: dict[str, Tensor],
    states: States,
    names: Sequence[str],
    work: Work,
    scalars: StepScalars,
    options: StackOptions,
    **more: Tensor | None,
) -> Any:
    """Run a part of the rules, compiled if possible.

    Args:
        rules: a function of `rules`.
        overwritten: its arguments that it overwrites.
        states: the weights and states of the stack.
        names: those that it needs.
        work: where the weights are gathered; memory to compute in where nothing is compiled.
        more: its other arguments.

    Returns:
        What `rules` returns.
    """
    stack = next(iter(overwritten.values()))
    if stack.numel() <= _LARGEST and compiling.is_active():
        stacks = {
            name: states.weights(work.weights) if name == "weights" else states.read(name)
            for name in names
            if name != "last_polarity" or options.has_polarity
        }
        # Bools go in and out as bytes: the code generated for those is many times faster.
        stacks = {name: s.view(torch.uint8) if s.dtype == torch.bool else s for name, s in stacks.items()}
        in_place = stack.device.type != "cpu"
        changed = compiling.run(
            _on_copies, rules, overwritten, stacks, in_place, scalars=_as_tensors(scalars), options=options, **more
        )
        if changed is not None:
            result, written = changed
            for name, new in written.items():
                states.write(name, new.view(torch.bool) if new.dtype == torch.uint8 else new)
            return result
        del stacks
    return rules(**overwritten, states=states, work=work, scalars=scalars, options=options, **more)


def _first_pass(g: Tensor, with_deviations: bool, watch_every: int) -> FirstPass:
    return first_pass(g.clone(), with_deviations, watch_every)


def _take_step_(g: Tensor, states: StatesAndMomenta, work: Work, **more: Any) -> tuple[Tensor, Watched | None]:
    drop_unusable_(g, work.scratch)
    return take_step_(g, states, work=work, **more)


def _scale_gradient_(g: Tensor, states: States, work: Work, **more: Any) -> tuple[Tensor, Tensor]:
    drop_unusable_(g, work.scratch)
    return scale_gradient_(g, states, work=work, **more)


def _on_copies(
    rules: Callable[..., Any],
    overwritten: dict[str, Tensor],
    stacks: dict[str, Tensor],
    in_place: bool,
    **more: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """The function that is compiled: the rules on copies (which a graph never makes), and the states they changed.

    States, but not weights, are changed in place where that can be: PyTorch 2.13's C++ code generator loses track of
    buffers (KeyError) in graphs that change their inputs.
    """
    copies = {name: stack.clone() for name, stack in overwritten.items()}
    kept = {name: stack for name, stack in stacks.items() if in_place and name != "weights"}
    states = _Loaded({name: kept[name] if name in kept else stack.clone() for name, stack in stacks.items()})
    result = rules(**copies, states=states, work=Work(), **more)
    return result, states.written


class _Loaded:
    """Weights and states read beforehand."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        self._stacks = stacks
        self.written: dict[str, Tensor] = {}

    def weights(self, out: Tensor | None = None) -> Tensor:
        return self._stacks["weights"]

    def read(self, name: str) -> Tensor:
        return self._stacks[name]

    def write(self, name: str, stack: Tensor) -> None:
        self.written[name] = stack.to(torch.uint8) if stack.dtype == torch.bool else stack


def _as_tensors(scalars: StepScalars) -> StepScalars:
    """Numbers that change with the step as 0-d tensors: as Python numbers each would be compiled into the graph."""
    scheduler = 1.0 if scalars.scheduler is None else scalars.scheduler
    correction = 1.0 if scalars.bias_correction is None else scalars.bias_correction
    numbers = [scalars.momentum_rate, scalars.gradient_share, scalars.clip_bound, scheduler, correction]
    rate, share, bound, factor, root = torch.tensor(numbers, dtype=torch.float32, device="cpu").unbind()
    return StepScalars(rate, share, bound, factor, None if scalars.bias_correction is None else root)

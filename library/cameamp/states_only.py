"""The step that torch.distributed.checkpoint takes so that a new optimizer has states to read into: it leaves no trace.

Such a step has a learning rate of 0 in every group and gradients of 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .context.driver import Driver
from .groups import Group, States
from .sharding import Processes, cut_of
from .stacks.stack import Stack


def is_asked_for(
    entries: Iterable[Mapping[str, Any]], active: Iterable[Sequence[Tensor]], processes: Processes
) -> bool:
    """Whether a first step is only to make states; one read-back if all learning rates are 0, and none else.

    Args:
        entries: the optimizer's `param_groups`.
        active: the parameters of each group that have a gradient.
        processes: those that hold the parameters.
    """
    params = [p for group in active for p in group]
    if not params or any(float(entry["lr"]) != 0 for entry in entries):
        return False
    grads = [cut_of(p).local([p.grad])[0] for p in params if p.grad is not None]
    moved = torch.stack([grad.ne(0).any().to(grads[0].device) for grad in grads]).any().float().view(1)
    return processes.add_up([moved])[0].item() == 0


def make(groups: Sequence[Group], stacks: Sequence[Sequence[Stack]], states: States, driver: Driver) -> None:
    """Give the parameters of some stacks the states that their first step will start from, and count no step."""
    for group, own in zip(groups, stacks):
        for stack in own:
            group.bind(stack, states)
            counters = [row.counter for row in group.states(group.phase(stack)) if row.counter]
            for p in stack.params:
                states[p].update(dict.fromkeys(("step", *counters), 0))
    driver.make_room(groups)

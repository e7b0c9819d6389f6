"""Another learning rate for a resumed optimizer, whose checkpoint brings its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .optimizer import CameAMP
from .rounding import Dither
from .sharding import cut_of
from .states import LR_MASK, in_format


@torch.no_grad()
def rescale(optimizer: CameAMP, lrs: Sequence[float]) -> None:
    """Go on at other learning rates, as if the run had begun with them.

    A group's `initial_lr` becomes the new rate, its `lr` keeps its ratio to it, which is the scheduler's, and the
    learning-rate masks of its parameters are multiplied by new rate / old rate, within `min_lr` and `max_lr`. A
    scheduler that keeps base rates of its own has to be given the new ones too.

    Args:
        optimizer: after `load_state_dict`.
        lrs: the new learning rate of each group; 0 freezes it.

    Raises:
        ValueError: there are more or fewer rates than groups, or one is neither 0 nor from min_lr to max_lr. Nothing
            has changed then.
    """
    groups = optimizer._groups_with_states()
    if len(lrs) != len(groups):
        raise ValueError(f"there are {len(lrs)} learning rates for {len(groups)} parameter groups")
    for group, lr in zip(groups, lrs):
        low, high = group.config.min_lr, group.config.max_lr
        if lr != 0 and not low <= lr <= high:
            raise ValueError(
                f"parameter group {group.number}: the new learning rate is {lr:g}; allowed: 0 or a number from min_lr "
                f"({low:g}) to max_lr ({high:g})"
            )
    for group, lr in zip(groups, lrs):
        old, factor = group.initial_lr, group.scheduler_factor
        for p in group.params:
            state = optimizer.state.get(p, {})
            if "step" not in state:
                continue
            mask = group.lr_mask(p, optimizer.state)
            # A frozen group has no rate to take a ratio to.
            mask = mask.mul_(lr / old) if old != 0 else mask.fill_(lr)
            mask.clamp_(group.config.min_lr, group.config.max_lr)
            position = torch.tensor([optimizer._parameters.position(p)], dtype=torch.int32, device=p.device)
            cut = cut_of(p)
            (mask,) = cut.local([mask])
            dither = Dither(position, state["step"] + 1, cut.rows(p.shape)[0] * p.shape[1:].numel())
            written = in_format(LR_MASK.name, mask, group.format(LR_MASK, p), mask.shape, dither)
            for key, value in written.items():
                (own,) = cut.local([state[key]])
                own.copy_(value.view(own.shape))
        # A frozen group's scheduler writes 0 whatever its factor is; its next step writes the right rate.
        group.restore({"initial_lr": lr, "lr": lr * (factor if old != 0 else 1.0)})
    optimizer._forget()

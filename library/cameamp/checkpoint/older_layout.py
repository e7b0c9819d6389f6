"""Checkpoints of the implementation that this one replaces: its 32-bit layout is read, its 8-bit one refused.

Its 32-bit states have the same names and meanings as those here. They differ in form: moments have the dtype of the
parameter, and after a resume torch has cast masks and polarities to it, too. Its 8-bit layout never updates the
residual that its steps divide by, so there is nothing to resume from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

VERSION = 1
NOTE = "it is an older implementation's, of magic_version 1; its masks and moments are taken over"

_TENSORS = ("lr_mask", "exp_avg", "exp_avg_sq", "exp_avg_res", "s")
_WARMUP_ONLY = ("s", "last_polarity")
# Written there for optimizers of another kind, partly as tuples of one number.
_MEANINGLESS = ("context_window", "edge_threshold", "adaptation_rate")


def is_written_in(saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has one of these layouts, by its version and its options; neither is enough alone."""
    version = saved.get("magic_version")
    if "magic8_version" not in saved and (version != VERSION or isinstance(version, bool)):
        return False
    options = ("lr", "warmup_steps", "beta1_decay")
    return all(
        all(name in group for name in options) and "group_checksum" not in group for group in saved["param_groups"]
    )


def converted(
    saved: Mapping[str, Any], groups: Sequence[Sequence[Tensor]], labels: Mapping[Tensor, str]
) -> dict[str, Any]:
    """The checkpoint in today's layout, without checksums. Other errors are left for `load` to find and refuse.

    Args:
        saved: the checkpoint; not changed.
        groups: the parameters of the optimizer's groups, as many as the checkpoint's.
        labels: what error messages call each parameter.

    Raises:
        ValueError: it is the 8-bit layout, or a polarity is not one.
    """
    states = dict(saved["state"])
    for params, saved_group in zip(groups, saved["param_groups"]):
        for p, key in zip(params, saved_group["params"]):
            state = states.get(key)
            if not isinstance(state, Mapping) or not state:
                continue
            if "magic8_version" in saved or any(name.endswith("_q") for name in map(str, state)):
                raise ValueError(
                    f"{labels[p]}: its state is in the 8-bit layout of an older implementation (magic8_version "
                    f"{saved.get('magic8_version')}), which never updates the residual; only its 32-bit layout is read"
                )
            try:
                states[key] = _converted_state(state, saved_group["warmup_steps"])
            except ValueError as error:
                raise ValueError(f"{labels[p]}: {error}") from None
    saved_groups = [
        {name: value for name, value in group.items() if name not in _MEANINGLESS} for group in saved["param_groups"]
    ]
    return {"state": states, "param_groups": saved_groups}


def _converted_state(saved: Mapping[str, Any], warmup_steps: Any) -> dict[str, Any]:
    state = dict(saved)
    for name in _TENSORS:
        value = state.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            state[name] = value.to(torch.float32)
    polarity = state.get("last_polarity")
    if isinstance(polarity, Tensor) and polarity.dtype != torch.bool:
        if not ((polarity == 0) | (polarity == 1)).all():
            raise ValueError("the state 'last_polarity' has elements other than 0 and 1")
        state["last_polarity"] = polarity.bool()
    # That implementation frees these only in the step that ends the warm-up; a resumed run may have skipped it.
    step = state.get("step")
    if isinstance(step, int) and isinstance(warmup_steps, int) and step >= warmup_steps:
        for name in _WARMUP_ONLY:
            state.pop(name, None)
    return state

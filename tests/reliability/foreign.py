"""Checkpoints of other optimizers for the parameters of a run, as a user may load them by mistake."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from .runs import Run


def adamw(run: Run) -> dict[str, Any]:
    """torch's AdamW."""
    return _stepped(torch.optim.AdamW, run)


def sgd_with_momentum(run: Run) -> dict[str, Any]:
    """torch's SGD."""
    return _stepped(torch.optim.SGD, run, momentum=0.9)


def bitsandbytes_adamw8bit(run: Run) -> dict[str, Any]:
    """bitsandbytes' AdamW8bit, or its layout filled with zeros if it has no kernel for this device."""
    import bitsandbytes

    try:
        return _stepped(bitsandbytes.optim.AdamW8bit, run)
    except Exception:
        saved = adamw(run)
        for state in saved["state"].values():
            codes = torch.zeros_like(state["exp_avg"], dtype=torch.uint8)
            state.clear()
            state |= {"step": 1, "state1": codes, "state2": codes, "qmap1": torch.zeros(256), "absmax1": torch.ones(1)}
        return saved


def ai_toolkit_automagic(run: Run) -> dict[str, Any]:
    """The layout of ai-toolkit's Automagic: factored second moments, a mask of int8 and one scale."""
    state = {}
    for index, p in enumerate(run.params):
        shape = p.shape
        moments = (
            {"exp_avg_sq_row": torch.rand(shape[:-1]), "exp_avg_sq_col": torch.rand(shape[:-2] + shape[-1:])}
            if p.ndim >= 2
            else {"exp_avg_sq": torch.rand(shape)}
        )
        mask = {"quantized": torch.full(shape, 127, dtype=torch.int8), "scale": 1e-8, "orig_dtype": torch.float32}
        state[index] = {
            "step": 9, "last_step": 9, "avg_lr": torch.tensor(1e-6), "RMS": torch.tensor(1.0), **moments,
            "last_polarity": torch.rand(shape) > 0.5, "lr_mask": mask,
        }  # fmt: skip
    options = {"lr": 1e-6, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "beta2": 0.999, "weight_decay": 0.0}
    return {"state": state, "param_groups": _groups(run, options)}


_OLDER_OPTIONS = {
    "lr": 1e-3, "eps": (1e-30, 1e-16, 1e-8), "clip_threshold": 1.0, "betas": (0.8, 0.99, 0.999), "eta": 2.0,
    "beta1_decay": 0.9995, "weight_decay": 5e-4, "warmup_steps": 8, "context_window": (30,), "edge_threshold": (0.6,),
    "adaptation_rate": (0.25,), "came": True, "full_finetune": False,
}  # fmt: skip


def older_32bit(run: Run, step: int, dtype: torch.dtype = torch.float32, resumed: bool = False) -> dict[str, Any]:
    """The older implementation's 32-bit layout, magic_version 1.

    Args:
        run: the run whose parameters the checkpoint is for.
        step: steps taken; its warm-up is 8 steps long.
        dtype: of the parameters, and so of the moments.
        resumed: whether masks and polarities are of that dtype too, as after torch has loaded such a file.
    """
    state = {}
    for index, p in enumerate(run.params):
        generator = torch.Generator().manual_seed(index)
        random = torch.rand(p.shape, generator=generator)
        entry: dict[str, Any] = {
            "lr_max": 1e-3, "step": step, "lr_mask": 1e-7 + 1e-3 * random, "avg_lr": 5e-4,
            "exp_avg": (random - 0.5).to(dtype), "exp_avg_sq": random.to(dtype), "exp_avg_res": (random / 2).to(dtype),
        }  # fmt: skip
        if step < 8:
            entry |= {"last_polarity": random > 0.5, "s": (random / 3).to(dtype)}
        if p.ndim == 2:
            entry["row_scaling"] = torch.ones(p.shape[0], 1)
        if resumed:
            entry = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in entry.items()}
        state[index] = entry
    return {"state": state, "param_groups": _groups(run, _OLDER_OPTIONS), "magic_version": 1}


def older_8bit(run: Run, step: int) -> dict[str, Any]:
    """The older implementation's 8-bit layout, magic8_version 2: its scales are objects."""
    saved = older_32bit(run, step)
    for state in saved["state"].values():
        for name in ("lr_mask", "exp_avg", "exp_avg_sq", "exp_avg_res", "s", "row_scaling"):
            if name in state:
                codes = torch.zeros(state.pop(name).shape, dtype=torch.uint8)
                scale = SimpleNamespace(absmax=torch.ones(1), code=torch.zeros(256), blocksize=4096)
                state |= {f"{name}_q": codes, f"{name}_q_scale": scale}
    del saved["magic_version"]
    return {**saved, "magic8_version": 2}


def _stepped(optimizer_class: type[Any], run: Run, **options: Any) -> dict[str, Any]:
    params = [torch.nn.Parameter(p.detach().clone()) for p in run.params]
    optimizer = optimizer_class([{"params": params[:4]}, {"params": params[4:]}], lr=1e-3, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def _groups(run: Run, options: dict[str, Any]) -> list[dict[str, Any]]:
    count = len(run.params)
    return [{**options, "params": list(range(4))}, {**options, "params": list(range(4, count))}]

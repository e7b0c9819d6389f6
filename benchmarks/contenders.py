"""The optimizers that the benchmarks compare, each built the same way."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import library.automagic_cameamp as family

from .cost import tensors_in

Parameters = Sequence[torch.nn.Parameter]
Build = Callable[[Parameters], torch.optim.Optimizer]

REFERENCE = "torch AdamW foreach"

# Name: module, class, options. What users would pick instead, each at a learning rate at which it does not diverge.
_PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    REFERENCE: ("torch.optim", "AdamW", {"lr": 1e-6, "foreach": True}),
    "torch AdamW for-loop": ("torch.optim", "AdamW", {"lr": 1e-6, "foreach": False}),
    "torch AdamW fused": ("torch.optim", "AdamW", {"lr": 1e-6, "fused": True}),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {"lr": 1e-6}),
    "pytorch_optimizer CAME": ("pytorch_optimizer", "CAME", {"lr": 1e-6}),
    "prodigyopt Prodigy": ("prodigyopt", "Prodigy", {"lr": 1e-3}),
    "lion_pytorch Lion": ("lion_pytorch", "Lion", {"lr": 1e-6}),
    "transformers Adafactor": (
        "transformers.optimization",
        "Adafactor",
        {"lr": 1e-6, "relative_step": False, "scale_parameter": False},
    ),
    "adv_optm Adopt_adv": ("adv_optm", "Adopt_adv", {"lr": 1e-6}),
    "adv_optm AdamW_adv": ("adv_optm", "AdamW_adv", {"lr": 1e-6}),
}

# Peers of which only the training is compared.
_PEERS_IN_TRAINING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prodigy-plus-schedule-free": ("prodigyplus", "ProdigyPlusScheduleFree", {"lr": 1.0}),
    "schedule-free AdamW": ("schedulefree", "AdamWScheduleFree", {"lr": 1e-3}),
    "adv_optm Prodigy_adv": ("adv_optm", "Prodigy_adv", {"lr": 1.0}),
    "adv_optm SinkSGD_adv": ("adv_optm", "SinkSGD_adv", {"lr": 1e-3}),
}

PHASES = ("early", "late warm-up", "after")

FAMILY = tuple(name for name in family.__all__ if name.startswith("Automagic"))


def peers() -> dict[str, Build]:
    """The peers whose packages are installed. A line is printed for each one that is left out."""
    found: dict[str, Build] = {}
    for name in _PEERS:
        try:
            found[name] = peer(name)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return found


def peer(name: str, **options: Any) -> Build:
    """One peer.

    Args:
        name: which one.
        options: instead of the options that it has here.

    Raises:
        ImportError: its package is not installed.
    """
    module, class_name, own = {**_PEERS, **_PEERS_IN_TRAINING}[name]
    return _builder(getattr(importlib.import_module(module), class_name), {**own, **options})


def in_phases(name: str, phases: Sequence[str] = PHASES, **options: Any) -> dict[str, Build]:
    """One of the four optimizers, once for each phase; it stays in that phase."""
    suffix = ", rules" if options.get("fused") is False else ""
    return {f"{name}{suffix}, {phase}": _in_phase(getattr(family, name), phase, options) for phase in phases}


class Copy:
    """Copies the weights, gradients and states once: a bound that no optimizer's step can go below.

    Args:
        parameters: the parameters, with their gradients.
        state: the optimizer's state.
    """

    def __init__(self, parameters: Parameters, state: Mapping[Any, Any]) -> None:
        self._sources = [t for p in parameters for t in (p.detach(), p.grad) if t is not None] + tensors_in(dict(state))
        self._targets = [torch.empty_like(t) for t in self._sources]

    def step(self) -> None:
        torch._foreach_copy_(self._targets, self._sources)


def _builder(optimizer_class: Any, options: dict[str, Any]) -> Build:
    return lambda parameters: optimizer_class(list(parameters), **options)


def _in_phase(optimizer_class: Any, phase: str, options: dict[str, Any]) -> Build:
    def build(parameters: Parameters) -> torch.optim.Optimizer:
        warmup = 0 if phase == "after" else 1_000_000
        optimizer = optimizer_class(list(parameters), lr=1e-6, warmup_steps=warmup, **options)
        if phase == "late warm-up":
            optimizer.step()
            # Half of the warm-up is over once the step counter says so.
            for state in optimizer.state.values():
                state["step"] = 600_000
        return optimizer

    return build

"""A small, repeatable training run of any optimizer of the family, and the comparison of two runs."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor

import library.automagic_cameamp as family

OPTIMIZERS: list[type[Any]] = [
    value
    for name in family.__all__
    if isinstance(value := getattr(family, name), type) and issubclass(value, torch.optim.Optimizer)
]
PAIRS = [(first, second) for first in OPTIMIZERS for second in OPTIMIZERS]

# Pairs of one shape that the 8-bit classes quantize, a pair that they do not quantize, and two single shapes.
SHAPES = {
    "a.lora_down.weight": (32, 128),
    "a.lora_up.weight": (128, 32),
    "b.lora_down.weight": (32, 128),
    "b.lora_up.weight": (128, 32),
    "c.weight": (6, 4, 3, 3),
    "d.weight": (6, 4, 3, 3),
    "c.bias": (5,),
    "d.scale": (),
}
OPTIONS = {"lr": 1e-3, "max_lr": 1e-2, "warmup_steps": 8}
# Steps in the early phase, in the late warm-up and after it.
PHASES = {"early": 3, "late warm-up": 6, "after": 11}


class Run:
    """Parameters pulled towards targets, with a little noise.

    Args:
        optimizer_class: one of the family.
        named: whether the optimizer is given the parameters' names.
        dtype: of the parameters.
        in_backward: whether steps are taken parameter by parameter, and each gradient freed.
        options: of the optimizer, beside OPTIONS.
    """

    def __init__(
        self,
        optimizer_class: type[Any],
        named: bool = True,
        dtype: torch.dtype = torch.float32,
        in_backward: bool = False,
        **options: Any,
    ) -> None:
        self.in_backward = in_backward
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES.values()
        ]  # fmt: skip
        self.targets = [torch.randn(s, generator=generator) for s in SHAPES.values()]
        groups = [{"params": self.params[:4]}, {"params": self.params[4:], "lr": 5e-4, "weight_decay": 0.01}]
        self.optimizer = optimizer_class(groups, **{**OPTIONS, **options})
        if named:
            self.optimizer.set_parameter_names(dict(zip(self.params, SHAPES)))
        self.taken = 0

    def loss(self) -> float:
        """Half the squared distance from the targets."""
        return sum(0.5 * (p.detach().float() - t).square().sum().item() for p, t in zip(self.params, self.targets))

    def run(self, steps: int) -> Run:
        """Take some steps. The 0-d parameter has no gradient in the first four of the run."""
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 + self.taken)
            for p, target in zip(self.params, self.targets):
                noise = 0.1 * torch.randn(p.shape, generator=generator)
                p.grad = (p.detach().float() - target + noise).to(p.dtype)
            if self.taken < 4:
                self.params[len(SHAPES) - 1].grad = None
            if self.in_backward:
                self.step_parameters()
            self.optimizer.step()
            self.taken += 1
        return self

    def step_parameters(self) -> None:
        """Step the parameters one by one, the last ones first, inside of a backward pass."""

        def step_each(_: torch.Tensor) -> None:
            for group in reversed(self.optimizer.param_groups):
                for index, p in reversed(list(enumerate(group["params"]))):
                    self.optimizer.step_parameter(p, group, index)
                    p.grad = None

        root = torch.zeros((), requires_grad=True)
        root.register_hook(step_each)
        root.backward()

    def resumed(self, optimizer_class: type[Any], **options: Any) -> Run:
        """A new run with another optimizer that continues from a checkpoint of this one."""
        return took_over(Run(optimizer_class, **options), self)

    def everything(self) -> dict[str, Any]:
        """Copies of everything that training depends on, by name."""
        return everything(self.optimizer)


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of an optimizer's weights, states, options and context, by name."""
    found: dict[str, Any] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        found[f"{index} weight"] = p.detach().clone()
        for name, value in optimizer.state.get(p, {}).items():
            found[f"{index} {name}"] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                found[f"group {number} {name}"] = copy.deepcopy(value)
    if hasattr(optimizer, "c_optim"):
        context = optimizer.c_optim.state_dict()
        found.update((f"context {name}", value) for name, value in context.pop("c_optim_context").items())
        found.update((f"context {name}", value) for name, value in context.items())
    return found


def difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The name of the first value that is not the same bit for bit, or None."""
    if a.keys() != b.keys():
        return f"one has {sorted(a.keys() ^ b.keys())}"
    for name, value in a.items():
        other = b[name]
        if isinstance(value, Tensor):
            same = isinstance(other, Tensor) and value.dtype == other.dtype and torch.equal(_bits(value), _bits(other))
        else:
            same = type(value) is type(other) and value == other
        if not same:
            return name
    return None


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8) if value.dtype != torch.bool else value


def takes_names() -> bool:
    """Whether this torch's optimizers take (name, parameter) pairs."""
    try:
        torch.optim.SGD([("p", torch.nn.Parameter(torch.zeros(1)))])
    except TypeError:
        return False
    return True


def through_torch_save(value: Any) -> Any:
    """What is read back after saving to a file."""
    return from_bytes(to_bytes(value))


def to_bytes(value: Any) -> bytes:
    """The file that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """What torch.load reads, without ever executing a pickle."""
    return torch.load(io.BytesIO(data), weights_only=True)


def states_are_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every weight and state is finite."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [p.detach() for p in params]
    tensors += [v for p in params for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def took_over(second: Any, first: Any) -> Any:
    """Let `second` continue from `first`: with its weights, its step and, through a file, its optimizer's state."""
    for p, q in zip(second.params, first.params):
        p.data.copy_(q.data)
    second.optimizer.load_state_dict(through_torch_save(first.optimizer.state_dict()))
    second.taken = first.taken
    return second

"""Processes over gloo, each with shards of the parameters (FSDP2), against one process with all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import library.automagic_cameamp as family

BATCH = 12  # divisible by every number of processes here
OPTIONS = {"lr": 1e-4, "warmup_steps": 12}


def exact() -> dict[str, Any]:
    """For `fully_shard`: gradients that do not depend on the number of processes, because they come of float64.

    Where a gradient is close to 0, its rounding decides the direction of a step, and two runs part.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)}


def halves() -> dict[str, Any]:
    """For `fully_shard`: FSDP's own mixed precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


class Model(nn.Module):
    """Matrices, a kernel, vectors and a LoRA pair; some tensors have fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 10, 3)
        self.pointwise = nn.Conv2d(10, 7, 1)
        self.outer = nn.Linear(7 * 16, 9)
        self.norm = nn.LayerNorm(9)
        self.lora_down = nn.Linear(9, 2, bias=False)
        self.lora_up = nn.Linear(2, 9, bias=False)
        # The same shapes again, for stacks of several tensors.
        self.more = nn.ModuleDict({"lora_down": nn.Linear(9, 2, bias=False), "lora_up": nn.Linear(2, 9, bias=False)})
        self.head = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.pointwise(torch.tanh(self.inner(x)))).flatten(1)
        x = self.norm(self.outer(x))
        x = x + self.lora_up(self.lora_down(x)) - self.more["lora_up"](self.more["lora_down"](x))
        return self.head(torch.tanh(x))


def model_of(shape: Sequence[int] = (), **more: Any) -> nn.Module:
    """The model, the same at every call; sharded over a mesh of a shape, if one is given.

    Args:
        shape: of the mesh.
        more: for `fully_shard`.
    """
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.lora_up.weight.mul_(0.1)
    return shard(model, shape, **more) if shape else model


def shard(model: nn.Module, shape: Sequence[int], **more: Any) -> nn.Module:
    """The model with its parameters sharded over a mesh of a shape."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # torch up to 2.5.
        from torch.distributed._composable.fsdp import fully_shard
    names = ("replicate", "shard")[-len(shape) :]
    mesh = dist.device_mesh.init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)
    for layer in (model.inner, model.outer):
        fully_shard(layer, mesh=mesh, **more)
    fully_shard(model, mesh=mesh, **more)
    return model


def shard_all(model: nn.Module, **more: Any) -> nn.Module:
    """Any model, sharded as one unit over all processes."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)), **more)


def optimizer_of(name: str, model: nn.Module, **options: Any) -> Any:
    """An optimizer over two groups, with the parameters' names."""
    named = dict(model.named_parameters())
    factors = [p for name, p in named.items() if "lora" in name]
    others = [p for name, p in named.items() if "lora" not in name]
    groups = [{"params": others, "lr": 2e-4}, {"params": factors, "weight_decay": 0.01}]
    optimizer = getattr(family, name)(groups, **{**OPTIONS, **options})
    optimizer.set_parameter_names({p: name for name, p in named.items()})
    return optimizer


def train(model: nn.Module, optimizer: Any, first: int, last: int, rank: int = 0, ranks: int = 1) -> None:
    """Steps from `first` on, before `last`, on this rank's part of each batch.

    A model that is not sharded computes its gradients in float64, as `exact` has it of one that is.
    """
    forward = partial(_in_float64, model) if ranks == 1 else model
    for step in range(first, last):
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        x, y = _batch(step)
        loss = _loss(forward, x[mine], y[mine])
        loss.backward()
        family.report_loss(optimizer, loss)
        optimizer.step()
        optimizer.zero_grad()


def _batch(number: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(1000 + number))
    return x, x.mean(dim=(1, 2, 3)).unsqueeze(1) * 3 + x[:, :1, 0, 0]


def _loss(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (forward(x.double()) - y).square().mean()


def _in_float64(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {name: p.double() for name, p in model.named_parameters()}, (x,))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, by name."""
    return {name: whole(p) for name, p in model.named_parameters()}


# What the tests run ---------------------------------------------------------------------------------------------------


def steps_of(
    rank: int,
    shape: Sequence[int],
    names: Sequence[str],
    steps: int,
    mixed: bool = False,
    by_rules: Collection[int] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train with each of some optimizers, exactly or with FSDP's mixed precision.

    Args:
        rank: this process.
        shape: of the mesh.
        names: the optimizers.
        steps: how many.
        mixed: whether in mixed precision.
        by_rules: the processes that take the rules, as if they could not compile kernels.
        options: of the optimizers.

    Returns:
        What a process knows of the run, by the optimizer's name.
    """
    ranks = torch.Size(shape).numel()
    found = {}
    for name in names:
        model = model_of(shape, **(halves() if mixed else exact()))
        optimizer = optimizer_of(name, model, **options, fused=False if rank in by_rules else "auto")
        train(model, optimizer, 0, steps, rank, ranks)
        held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        found[name] = {
            "weights": weights(model),
            "multiplier": _multiplier(optimizer),
            "history": optimizer.c_optim.gradient_history if hasattr(optimizer, "c_optim") else [],
            "all sharded": all(hasattr(value, "device_mesh") for value in held),
            "rates": optimizer.get_learning_rates(),
            "masks": {key: whole(optimizer.get_lr_mask(p)) for key, p in model.named_parameters()},
            "bytes": sum(value.to_local().nbytes for value in held),
        }
    return found


def _multiplier(optimizer: Any) -> float:
    if not hasattr(optimizer, "c_optim"):
        return 0.0
    optimizer.state_dict()  # The context takes in the last step with the first message of the next one, or here.
    return optimizer.c_optim.compute_contextual_lr_multiplier()


def loss_of(values: dict[str, Tensor]) -> float:
    """The loss of some weights on batches that nobody trained on."""
    model = model_of()
    model.load_state_dict(values)
    losses = [_loss(partial(_in_float64, model), *_batch(-step)) for step in range(1, 9)]
    return torch.stack(losses).mean().item()


def alone(name: str, steps: int, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Train in this process. Returns the weights and the optimizer."""
    model = model_of()
    optimizer = optimizer_of(name, model, **options)
    train(model, optimizer, 0, steps)
    return weights(model), optimizer


# One of them has coded momenta.
MANY = [(96, 64)] + [(3, 4 + number % 3) for number in range(1443)]


def messages_of(rank: int, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Take steps of many small tensors.

    Returns:
        For each optimizer, early and after the warm-up: how often each kind of message was sent in a step, and the
        bytes of each.
    """
    from torch.distributed.tensor.debug import CommDebugMode

    found: dict[str, list[dict[str, Any]]] = {}
    model = nn.Module()
    model.many = nn.ParameterList(torch.randn(shape) for shape in MANY)
    shard_all(model)
    for name in names:
        optimizer = getattr(family, name)(model.parameters(), lr=1e-4, warmup_steps=5)
        for step in range(1, 6):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
            if step not in (2, 5):
                optimizer.step()
                continue
            with CommDebugMode() as seen, _lengths() as lengths:
                optimizer.step()
            kinds = {str(kind): count for kind, count in seen.get_comm_counts().items()}
            found.setdefault(name, []).append({"kinds": kinds, "bytes": lengths})
    return found


@contextmanager
def _lengths() -> Iterator[list[int]]:
    """The bytes of all that is reduced inside."""
    found: list[int] = []
    reduce = dist.all_reduce

    def noted(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
        found.append(tensor.nbytes)
        return reduce(tensor, *arguments, **more)

    dist.all_reduce = noted
    try:
        yield found
    finally:
        dist.all_reduce = reduce


def shards_of_columns(rank: int) -> str:
    """What the first step says of parameters whose columns are sharded."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    p.grad = torch.ones_like(p)
    optimizer = family.Automagic_CameAMP([p])
    try:
        optimizer.step()
    except RuntimeError as error:
        assert len(optimizer.state) == 0
        return str(error)
    return ""


def replaced(rank: int) -> list[list[str]]:
    """Have an optimizer's parameters replaced by shards, as accelerate does. Returns their names, and the factors'."""
    model = model_of()
    optimizer = optimizer_of("Automagic_CameAMP", model)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    shard(model, (dist.get_world_size(),), **exact())
    sharded = dict(model.named_parameters())
    for group, own in zip(optimizer.param_groups, order):
        group["params"] = [sharded[name] for name in own]
    optimizer.step()  # Without any gradient.
    train(model, optimizer, 0, 2, rank, dist.get_world_size())
    saved = optimizer.state_dict()
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    return [names, [name for name, p in sharded.items() if p in optimizer._parameters.factors]]

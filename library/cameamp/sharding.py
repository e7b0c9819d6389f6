"""What a process holds of a parameter: all of it, or under FSDP2 a shard, which is some of its rows.

The rules work on the local part of every tensor. They need a few sums over whole tensors; `add_up` makes those of a
whole pass at once. `Whole` and `Alone` stand where nothing is sharded, so that no caller has to ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, distributed

from .storage import Spread

_ALLOWED = "one process, DDP, and FSDP2 (fully_shard) that shards rows, Shard(0), over one dimension of its mesh"


class Cut(Protocol):
    """Which part of some tensors of one shape a process holds."""

    def rows(self, shape: torch.Size) -> tuple[int, int]:
        """The first row and the number of rows that this process holds of a tensor of `shape`."""

    def most_rows(self, shape: torch.Size) -> int:
        """The number of rows that the process with most of them holds."""

    def local(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parts of tensors that this process holds, in the same memory. What is no DTensor is such a part."""

    def wrapped(self, parts: Sequence[Tensor], spread: Spread, rows: int) -> tuple[Tensor, ...]:
        """The tensors of a parameter of `rows` rows whose parts are given."""


class Whole:
    """This process holds all of them."""

    def rows(self, shape: torch.Size) -> tuple[int, int]:
        return 0, shape[0] if shape else 1

    def most_rows(self, shape: torch.Size) -> int:
        return shape[0] if shape else 1

    def local(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    def wrapped(self, parts: Sequence[Tensor], spread: Spread, rows: int) -> tuple[Tensor, ...]:
        return tuple(parts)


WHOLE = Whole()


@dataclass(frozen=True)
class Shard:
    """The process holds the rows that `torch.chunk` would give it.

    Attributes:
        mesh: the processes; its last dimension is the one that shards, one before it replicates.
        placements: where on the mesh the parameters are.
    """

    mesh: Any
    placements: tuple[Any, ...]

    def rows(self, shape: torch.Size) -> tuple[int, int]:
        most = self.most_rows(shape)
        first = min(self.mesh.get_local_rank(self.mesh.ndim - 1) * most, shape[0])
        return first, min(most, shape[0] - first)

    def most_rows(self, shape: torch.Size) -> int:
        return -(-shape[0] // self._processes())

    def _processes(self) -> int:
        """How many share a tensor."""
        return int(self.mesh.size(self.mesh.ndim - 1))

    def local(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():  # Or it would be an operation to differentiate.
            return [cast(Any, tensor).to_local() if is_sharded(tensor) else tensor for tensor in tensors]

    def wrapped(self, parts: Sequence[Tensor], spread: Spread, rows: int) -> tuple[Tensor, ...]:
        from torch.distributed.tensor import DTensor, Replicate

        placements = (Replicate(),) * self.mesh.ndim if spread is Spread.SAME else self.placements
        made = []
        for part in parts:
            shape = part.shape
            if spread is not Spread.SAME:
                first = rows if spread is Spread.BY_ROW else len(part) * self._processes()
                shape = torch.Size((first, *shape[1:]))
            stride = torch.empty(shape, device="meta").stride()
            made.append(DTensor.from_local(part, self.mesh, placements, run_check=False, shape=shape, stride=stride))
        return tuple(made)


def cut_of(p: Tensor) -> Cut:
    """Which part of a parameter this process holds."""
    return Shard(cast(Any, p).device_mesh, tuple(cast(Any, p).placements)) if is_sharded(p) else WHOLE


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, as FSDP2's are."""
    return hasattr(p, "device_mesh")


def check_shards(groups: Iterable[tuple[Sequence[Tensor], Sequence[torch.Size]]]) -> None:
    """Refuse parameters that are cut in another way than FSDP2 cuts them.

    Args:
        groups: for each group its parameters, and the shapes of those that it was built with.

    Raises:
        RuntimeError: it names the parameter's shape, who cut it, and what works.
    """
    meshes = {}
    for number, (params, shapes) in enumerate(groups):
        for p in params:
            label = f"a parameter of shape {tuple(p.shape)}"
            if getattr(p, "_fsdp_flattened", False):
                raise RuntimeError(f"{label} is of FSDP1, which flattens it; use FSDP2 (fully_shard, fsdp_version: 2)")
            if hasattr(p, "ds_id"):
                raise RuntimeError(f"{label} belongs to DeepSpeed; {_NO_ZERO}")
            if is_sharded(p):
                cut = Shard(cast(Any, p).device_mesh, tuple(cast(Any, p).placements))
                _check_placements(label, cut)
                if p.device.type != cut.mesh.device_type:
                    raise RuntimeError(
                        f"{label} is offloaded to {p.device.type}; shards must stay on the mesh, {cut.mesh.device_type}"
                    )
                meshes[cut.mesh] = label
        # ZeRO 1 and 2 put one vector in the place of a group's parameters.
        fewer = len(params) < len(shapes) or any(len(shape) > 1 for shape in shapes)
        if fewer and params and all(p.ndim == 1 for p in params):
            raise RuntimeError(
                f"parameter group {number} has {len(params)} vectors for its {len(shapes)} parameters; {_NO_ZERO}"
            )
    if len(meshes) > 1:
        first, other, *_ = meshes.values()
        raise RuntimeError(f"{first} and {other} are sharded over different meshes; give each mesh an optimizer")


_NO_ZERO = "DeepSpeed ZeRO flattens parameters, and these rules need rows: use FSDP2 (fully_shard) or DDP"


def _check_placements(label: str, cut: Shard) -> None:
    *before, last = cut.placements
    # A subclass of torch's Shard deals rows out in another order.
    if type(last).__name__ != "Shard" or last.dim != 0 or not all(each.is_replicate() for each in before):
        raise RuntimeError(f"{label} is placed as {cut.placements}; supported: {_ALLOWED}")


class Processes(Protocol):
    """The processes that hold the parameters of one optimizer."""

    @property
    def shards(self) -> bool:
        """Whether any parameter is sharded."""

    def speaks(self, cut: Cut) -> bool:
        """Whether this process adds its numbers of a tensor to a sum; of copies only one does."""

    def add_up(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes of some tensors, with the same bits on each; one message."""

    def count(self) -> int:
        """How many processes there are."""


class Alone:
    """No parameter is sharded: what this process knows of a tensor is all that there is to know."""

    shards = False

    def speaks(self, cut: Cut) -> bool:
        return True

    def add_up(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(parts)

    def count(self) -> int:
        return 1


ALONE = Alone()


@dataclass(frozen=True)
class Mesh:
    """The processes of a mesh, of which each row holds all shards.

    In a mesh of two dimensions, only its first row speaks: the others hold copies, and all take the same sums.

    Attributes:
        mesh: torch's.
    """

    mesh: Any

    shards = True

    def speaks(self, cut: Cut) -> bool:
        first_row: bool = self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0
        return first_row and (cut is not WHOLE or self.mesh.get_local_rank(self.mesh.ndim - 1) == 0)

    def add_up(self, parts: Sequence[Tensor]) -> list[Tensor]:
        if not parts:
            return []
        vector = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(vector, group=self._group())
        sizes = [part.numel() for part in parts]
        return [total.view(part.shape) for total, part in zip(vector.split(sizes), parts)]

    def count(self) -> int:
        return int(self.mesh.size())

    def _group(self) -> Any:
        if self.mesh.ndim == 1:
            return self.mesh.get_group()
        # A mesh of two dimensions has a group for each, and none for all of its processes, unless those are all.
        if self.mesh.size() == distributed.get_world_size():
            return None
        return self.mesh._flatten().get_group()


def added_by(processes: Processes, cut: Cut, part: Tensor) -> Tensor:
    """What this process adds to a sum over all of them: its part, or zeros for a copy that another one adds."""
    return part if processes.speaks(cut) else torch.zeros_like(part)


def totals_of(processes: Processes, parts: Sequence[tuple[Cut, Sequence[Tensor]]]) -> list[list[Tensor]]:
    """The sums over all processes of what this one knows of some tensors, in the same order; one message.

    Args:
        processes: those that hold the shards.
        parts: for each tensor, or stack of them, how it is cut, and its parts of the sums.
    """
    own = [added_by(processes, cut, part) for cut, each in parts for part in each]
    totals = iter(processes.add_up(own))
    return [[next(totals) for _ in each] for _, each in parts]


def processes_of(params: Iterable[Tensor]) -> Processes:
    """The processes that hold some parameters, which `check_shards` found right."""
    return next((Mesh(cast(Any, p).device_mesh) for p in params if is_sharded(p)), None) or Alone()

"""What a checkpoint consists of, as both its writer and its reader need to know it.

torch's layout, `{"state": {number: {...}}, "param_groups": [...]}`, with `magic_version` at its top. Every parameter's
state has a checksum in its group, and every group one over its options and these, so that damage to any of it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..checksum import checksum
from ..config import OPTION_NAMES
from ..context.memory import SAVED as CONTEXT
from ..groups import MAGNITUDES, Group

# Layout of the checkpoints written here; 1 and 2 are those of an older implementation.
VERSION = 3

# A group's checksums: of its parameters' states, and of the group itself.
CHECKSUMS = ("state_checksums", "group_checksum")

# What the checksum of a saved group covers.
_SEALED = ("initial_lr", "param_names", "state_checksums", MAGNITUDES, *CONTEXT, *OPTION_NAMES)

# What a saved group has of this family. Schedulers and trainers may add to a group, some of them their place in a run.
OWN_ENTRIES = {"params", *CHECKSUMS, *_SEALED}


def group_checksum(saved_group: Mapping[str, Any]) -> int:
    """The checksum of a saved group's options and, through `state_checksums`, of all its states."""
    return checksum({name: saved_group[name] for name in _SEALED if name in saved_group})


def sealed(saved_group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as it is saved, with its checksum."""
    return {**saved_group, "group_checksum": group_checksum(saved_group)}


def labels_of(groups: Sequence[Group], names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """What error messages call each parameter."""
    parameters = (p for group in groups for p in group.params)
    return {
        p: f"parameter {position}" + (f" '{names[p]}'" if p in names else "") + f" of shape {tuple(p.shape)}"
        for position, p in enumerate(parameters)
    }

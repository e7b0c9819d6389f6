"""Two processes: DDP's replicas stay equal, and what is not supported says so."""

from __future__ import annotations

import pytest
import torch
from reliability.distributed import built_too_early, ddp, flattened

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def test_ddp_replicas_are_equal_bit_for_bit_also_after_resuming():
    for name, digests in ddp(steps=60).items():
        assert len(digests) == 4
        assert len(set(digests)) == 1, name


def refused(message):
    return "is of FSDP1, which flattens it; use FSDP2" in message


def test_fsdp1_is_refused_by_name_at_the_first_step():
    for messages in flattened():
        assert len(messages) == 2
        for kind, by_optimizer in messages.items():
            for name, message in by_optimizer.items():
                assert refused(message), (kind, name)


def test_an_optimizer_whose_parameters_were_replaced_by_shards_is_not_silent():
    for messages in built_too_early():
        for kind, by_optimizer in messages.items():
            for name, message in by_optimizer.items():
                assert refused(message) or "build the optimizer after that" in message, (kind, name)

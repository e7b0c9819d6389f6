"""Two processes: DDP's replicas stay equal, and what is not supported says so."""

from __future__ import annotations

import pytest
import torch
from reliability.distributed import built_too_early, ddp, sharded

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def test_ddp_replicas_are_equal_bit_for_bit_also_after_resuming():
    for name, digests in ddp(steps=60).items():
        assert len(digests) == 4
        assert len(set(digests)) == 1, name


def refused(message):
    return "sharded over processes (FSDP, DTensor)" in message and "Supported: one process, and DDP" in message


def test_sharded_parameters_are_refused_at_the_first_step():
    for messages in sharded():
        assert len(messages) == 3
        for kind, by_optimizer in messages.items():
            for name, message in by_optimizer.items():
                assert refused(message), (kind, name)


def test_an_optimizer_whose_parameters_were_replaced_by_shards_is_not_silent():
    for messages in built_too_early():
        for kind, by_optimizer in messages.items():
            for name, message in by_optimizer.items():
                assert refused(message) or "build the optimizer after that" in message, (kind, name)

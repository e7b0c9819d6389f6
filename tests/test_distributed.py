"""Two processes: DDP's replicas stay equal, and what is not supported says so."""

from __future__ import annotations

import pytest
import torch
from reliability.distributed import ddp, fsdp2

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def test_ddp_replicas_are_equal_bit_for_bit_also_after_resuming():
    for name, digests in ddp(steps=60).items():
        assert len(digests) == 4
        assert len(set(digests)) == 1, name


def test_sharded_parameters_are_refused_at_the_first_step():
    for messages in fsdp2():
        for name, message in messages.items():
            assert "sharded over processes (FSDP, DTensor)" in message, name
            assert "Supported: one process, and DDP" in message

#!/usr/bin/env bash
# Versions: torch 2.13.0 (FSDP2 over gloo), prodigyopt 1.1.2.
#
# Behaviour: under FSDP2 (fully_shard) a parameter and its gradient are DTensors. g.sum() is one too, a pending sum, and
# g.sum().item() is the part of this process: no process adds up, none warns, and each has another number. One would
# expect the sum, as g.sum().full_tensor() has it, or an error, as many operations in place on a pending sum raise one.
#
# What follows: Prodigy decides about its rate by such sums. It runs under FSDP2, says nothing, and every process finds a
# rate of its own, as if its rows were a model; none is that of one process. It adds up over the processes by itself only
# if parameters have the mark of FSDP1; under FSDP2 one has to say fsdp_in_use=True, which asks for CUDA.
#
# Output seen: two processes, a matrix of ones with four rows each; then d after 60 steps on rows that have to go far on
# the first process and not on the second.
#   sum of 128 ones: rank 0 64, rank 1 64
#   d of one process 0.0464; of rank 0 0.109, of rank 1 0.00103
#
# Fails if any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 prodigyopt==1.1.2 numpy
cat > "$folder/try.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from prodigyopt import Prodigy
from torch.distributed.fsdp import fully_shard


def rate(model):
    """Prodigy's d after 60 steps."""
    optimizer = Prodigy(model.parameters(), lr=1.0)
    target = torch.cat([torch.full((4,), 3.0), torch.full((4,), 0.03)])
    for step in range(60):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        ((model(x) - x.mean(dim=1, keepdim=True) * target) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.param_groups[0]["d"]


def model():
    layer = torch.nn.Linear(16, 8, bias=False)
    torch.nn.init.zeros_(layer.weight)
    return layer


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    sharded = fully_shard(model(), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    ones = torch.ones_like(sharded.weight)
    found = {"sum": ones.sum().item(), "whole": ones.sum().full_tensor().item(), "d": rate(sharded)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
    one = rate(model())
    first, second = (torch.load(f"{sys.argv[1]}/{rank}.pt") for rank in range(2))
    print(f"sum of 128 ones: rank 0 {first['sum']:g}, rank 1 {second['sum']:g}")
    print(f"d of one process {one:.3g}; of rank 0 {first['d']:.3g}, of rank 1 {second['d']:.3g}")
    assert first["sum"] == second["sum"] == 64 and first["whole"] == 128
    assert first["d"] > 10 * second["d"], "the processes agree"
PYTHON
mkdir "$folder/run"
"$folder/venv/bin/python" "$folder/try.py" "$folder/run" 2>/dev/null

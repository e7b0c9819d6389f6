#!/usr/bin/env bash
# Versions: torch 2.13.0 (torch.distributed.checkpoint over gloo).
#
# Behaviour: dcp.save(state, checkpoint_id=FOLDER) with a FOLDER that holds a checkpoint writes the new parts over the old
# ones, in files of the same names, and replaces .metadata last. If one process dies in between, the old .metadata is
# still there and fits the new files, which have the same names, sizes and places: dcp.load succeeds, says nothing, and
# gives the new rows of the processes that had written beside the old rows of the one that died. One would expect that a
# checkpoint without its commit is the old one, or no checkpoint: .metadata itself is written aside and renamed.
#
# What follows for users: save to a new folder and rename it when all processes have written. Weights and states of two
# steps are mixed otherwise.
#
# Output seen (the process with the last four rows dies in the second save):
#   loaded [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
#
# Fails if any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/try.py" <<'PYTHON'
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard


def work(rank, count, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{count}", rank=rank, world_size=count)
    mesh = dist.device_mesh.init_device_mesh("cpu", (count,))

    def rows(value):
        return {"w": DTensor.from_local(torch.full((8 // count,), value), mesh, [Shard(0)])}

    if count == 1:
        state = rows(-1.0)
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
        print("loaded", state["w"].to_local().tolist(), flush=True)
        return
    dcp.save(rows(1.0), checkpoint_id=f"{folder}/checkpoint")
    if rank == 1:

        def watch(event, arguments):
            if event == "open" and str(arguments[0]).endswith(".distcp"):
                time.sleep(5)  # The other process has written by then.
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    dcp.save(rows(2.0), checkpoint_id=f"{folder}/checkpoint")


if __name__ == "__main__":
    try:
        torch.multiprocessing.spawn(work, (2, sys.argv[1]), nprocs=2)
    except torch.multiprocessing.ProcessExitedException as error:
        assert error.signal_name == "SIGKILL", error
    torch.multiprocessing.spawn(work, (1, sys.argv[1]), nprocs=1)
PYTHON
mkdir "$folder/run"
found="$("$folder/venv/bin/python" "$folder/try.py" "$folder/run" 2>/dev/null | grep loaded)"
echo "$found"
test "$found" = "loaded [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]"

#!/usr/bin/env bash
# Versions: accelerate 1.15.0 with torch 2.13.0.
#
# Behaviour: `accelerate launch --cpu --num_processes 2 script.py` starts one process and exits with 0; that two were
# asked for is not mentioned. The script trains alone, on its own batches, and looks like a run of DDP that is slow.
# One would expect two processes, as on GPUs, or an error. `torchrun --nproc_per_node 2` with ACCELERATE_USE_CPU=true
# starts two.
#
# Output seen:
#   accelerate launch: 1 | torchrun: 2
#
# Fails if any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
cat > "$folder/ask.py" <<'PYTHON'
import os

import accelerate

# In one piece: two processes may print at once.
os.write(1, b"processes %d\n" % accelerate.Accelerator(cpu=True).num_processes)
PYTHON
launched="$("$folder/venv/bin/accelerate" launch --cpu --num_processes 2 "$folder/ask.py" 2>"$folder/errors" | grep -o 'processes 1' | wc -l)"
! grep -qi "num_processes" "$folder/errors"
torchrun="$(ACCELERATE_USE_CPU=true "$folder/venv/bin/torchrun" --nproc_per_node 2 "$folder/ask.py" 2>/dev/null | grep -o 'processes 2' | wc -l)"
echo "accelerate launch: $launched | torchrun: $torchrun"
test "$launched" = 1 && test "$torchrun" = 2

#!/bin/bash
# flashoptim 0.1.4, torch 2.13.0.
#
# FlashAdamW and the other optimizers of flashoptim write their own `lr` into every group as initial_lr, also into
# those that were given a learning rate of their own. torch's schedulers start from the initial_lr they find, and set
# it to the group's rate only where there is none. So, with groups of different rates, LambdaLR puts all of them on the
# rate of the constructor when it is built, even with a factor of 1. Who gave every group a rate, and the constructor
# none, trains at its default, 1e-3. Nothing warns: get_last_lr() gives 1e-3, too. Most schedulers of diffusers and
# transformers are LambdaLR. Without a scheduler the rates of the groups are in effect, and with torch's AdamW they
# always are.
#
# Output seen (two groups with 1e-4 and 1e-5; how far the first step moves them):
#
#   AdamW, no scheduler:      1.0e-04 1.0e-05
#   AdamW, LambdaLR:          1.0e-04 1.0e-05
#   FlashAdamW, no scheduler: 1.0e-04 1.0e-05
#   FlashAdamW, LambdaLR:     1.0e-03 1.0e-03
#
# flashoptim is meant for GPUs; its groups are the same there. A CPU needs the three arguments below.
#
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 flashoptim==0.1.4 numpy==2.4.6
cat > rates.py <<'PYTHON'
import importlib.metadata
import sys

import torch
from flashoptim import FlashAdamW

print("flashoptim", importlib.metadata.version("flashoptim"), "torch", torch.__version__, file=sys.stderr)
ON_A_CPU = {"quantize": False, "master_weight_bits": None, "fused": False}


def moved(optimizer_class, scheduled, **options):
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [first], "lr": 1e-4}, {"params": [second], "lr": 1e-5}]
    optimizer = optimizer_class(groups, **options)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    first.grad, second.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    return f"{-first.item():.1e} {-second.item():.1e}"


for optimizer_class, options in ((torch.optim.AdamW, {}), (FlashAdamW, ON_A_CPU)):
    for scheduled in (False, True):
        name = f"{optimizer_class.__name__}, {'LambdaLR' if scheduled else 'no scheduler'}:"
        print(f"{name:25} {moved(optimizer_class, scheduled, **options)}")
PYTHON
cat > expected.txt <<'LINES'
AdamW, no scheduler:      1.0e-04 1.0e-05
AdamW, LambdaLR:          1.0e-04 1.0e-05
FlashAdamW, no scheduler: 1.0e-04 1.0e-05
FlashAdamW, LambdaLR:     1.0e-03 1.0e-03
LINES
env/bin/python -W ignore rates.py 2> log > lines.txt || { tail -5 log >&2; exit 1; }
head -1 log
cat lines.txt
diff expected.txt lines.txt

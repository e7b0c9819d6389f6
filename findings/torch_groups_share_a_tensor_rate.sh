#!/bin/bash
# torch 2.13.0.
#
# An optimizer may be given its learning rate as a tensor, as torch advises for a compiled step with a scheduler.
# Groups without a rate of their own then get no copies: all of them hold the same tensor. Schedulers write into it in
# place, group after group, as if each had its own, so
#
# - the last group decides for all: LambdaLR with a function for each group, and OneCycleLR with a max_lr for each,
#   train every group at the last one's rate. A last group that is still to wait, at 0, stops the whole run;
# - ReduceLROnPlateau applies its factor once for each group: with two groups, such as those with and without weight
#   decay, 0.5 becomes 0.25, and with three 0.125.
#
# get_last_lr() agrees with the wrong rates, and nothing warns. With a number as the rate all is as one expects, and so
# it is if every group is given a tensor of its own.
#
# Output seen (the rates of the groups):
#
#   LambdaLR, factors 1 and 0          number: 0.1 0    tensor: 0 0    tensor each: 0.1 0
#   OneCycleLR, max_lr 0.2 and 0.02    number: 0.2 0.02    tensor: 0.02 0.02    tensor each: 0.2 0.02
#   ReduceLROnPlateau, factor 0.5      number: 0.05 0.05    tensor: 0.025 0.025    tensor each: 0.05 0.05
#
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
cat > rates.py <<'PYTHON'
import sys

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

print("torch", torch.__version__, file=sys.stderr)


def rates(kind, schedule):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    if kind == "tensor each":
        for group in groups:
            group["lr"] = torch.tensor(0.1)
    # The fused AdamW supports a rate that is a tensor.
    optimizer = torch.optim.AdamW(groups, lr=0.1 if kind == "number" else torch.tensor(0.1), fused=True)
    scheduler = schedule(optimizer)
    found = [float(group["lr"]) for group in optimizer.param_groups]
    assert found == [float(rate) for rate in scheduler.get_last_lr()]
    return f"{kind}: " + " ".join(f"{rate:.3g}" for rate in found)


def one_for_each(optimizer):
    return LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.0])


def one_cycle(optimizer):
    scheduler = OneCycleLR(optimizer, max_lr=[0.2, 0.02], total_steps=9, pct_start=5 / 9)
    for _ in range(4):  # Up to the maximum, which is the fifth of the 9 rates.
        optimizer.step()
        scheduler.step()
    return scheduler


def plateau(optimizer):
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):  # The second loss is no better.
        scheduler.step(1.0)
    return scheduler


for name, schedule in (
    ("LambdaLR, factors 1 and 0", one_for_each),
    ("OneCycleLR, max_lr 0.2 and 0.02", one_cycle),
    ("ReduceLROnPlateau, factor 0.5", plateau),
):
    print(f"{name:34} " + "    ".join(rates(kind, schedule) for kind in ("number", "tensor", "tensor each")))
PYTHON
env/bin/python -W ignore rates.py 2> log > lines.txt || { tail -5 log >&2; exit 1; }
head -1 log
cat lines.txt
cat > expected.txt <<'LINES'
LambdaLR, factors 1 and 0          number: 0.1 0    tensor: 0 0    tensor each: 0.1 0
OneCycleLR, max_lr 0.2 and 0.02    number: 0.2 0.02    tensor: 0.02 0.02    tensor each: 0.2 0.02
ReduceLROnPlateau, factor 0.5      number: 0.05 0.05    tensor: 0.025 0.025    tensor each: 0.05 0.05
LINES
diff expected.txt lines.txt

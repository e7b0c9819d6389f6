#!/bin/bash
# torch 2.13.0, as released on PyPI.
#
# A hook of register_post_accumulate_grad_hook is said to run when a gradient has been accumulated, and a callback queued
# in it when the backward pass ends; optimizers that step inside the backward pass, and free each gradient, rely on it.
# With torch.utils.checkpoint(use_reentrant=True) every segment is a backward pass of its own:
#
# - a parameter that two segments share gets two hooks, each with the gradient of one segment alone. A step in the hook
#   takes two steps with a part of the gradient each, and nothing says so;
# - callbacks run at the end of each segment, not of the whole pass.
#
# With use_reentrant=False, and without checkpointing, there is one hook with the whole gradient. Output seen (a weight of
# 1 used twice, whose gradient is 2; what each hook finds, and C where the callbacks run):
#
#   none: 2 C | not reentrant: 2 C | reentrant: 1 C 1 C
#
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
cat > run.py <<'PYTHON'
import torch
from torch.utils.checkpoint import checkpoint


def seen(reentrant):
    """What hooks and callbacks meet; `reentrant` None for no checkpointing."""
    weight, found = torch.nn.Parameter(torch.ones(1)), []

    def hook(p):
        found.append(f"{p.grad.item():g}")
        p.grad = None
        torch.autograd.Variable._execution_engine.queue_callback(lambda: found.append("C"))

    weight.register_post_accumulate_grad_hook(hook)
    x = torch.ones(1, requires_grad=True)
    for _ in range(2):
        x = x * weight if reentrant is None else checkpoint(lambda y: y * weight, x, use_reentrant=reentrant)
    x.backward()
    return " ".join(found)


print(f"none: {seen(None)} | not reentrant: {seen(False)} | reentrant: {seen(True)}")
PYTHON
line=$(env/bin/python run.py)
echo "$line"
test "$line" = "none: 2 C | not reentrant: 2 C | reentrant: 1 C 1 C"

#!/bin/bash
# gefen 1.2.3, torch 2.13.0.
#
# Gefen keeps the momentum as 8-bit codes, with one codebook of 256 values for all parameters. It learns the codebook in
# the first step, from that step's gradients, and keeps it. Where it finds no blocks in the gradient of a parameter
# ("period 1") it divides each element by itself before it learns, which leaves only -1, 0 and 1; in the steps, though,
# up to 256 elements share one scale. If it is so for all parameters, the codebook has three or four different values,
# all of them about -1, 0 or 1, and each element of the momentum is rounded to the largest of its 256, to minus that, or
# to 0 if the codebook has it. Training does not converge, or diverges, and nothing warns. One would expect an error of
# about a hundredth, as from other 8-bit optimizers. This happens
#
# - with ordinary gradients: below, with the weight of one layer of 64 x 64. Layers of a LoRA have done it, too. A large
#   parameter with blocks in its gradient prevents it;
# - always if all gradients are 0 in the first step. torch.distributed.checkpoint takes such a step by itself:
#   get_optimizer_state_dict(), called to save a checkpoint before training, spoils the momentum of the whole run.
#   torch's AdamW recovers from it.
#
# Output seen (a linear layer learns another one, batches of 256, 1000 steps; in brackets how far the loss grows):
#
#   320 x 16 AdamW: loss 0.000
#   320 x 16 Gefen: loss 0.000, 256 values
#   320 x 16 AdamW after get_optimizer_state_dict: loss 0.000
#   320 x 16 Gefen after get_optimizer_state_dict: loss grows, 3 values (1.37 to 3)
#   64 x 64 AdamW: loss 0.000
#   64 x 64 Gefen: loss grows, 3 values (1.35 to 285)
#
# Fails if any of this changes, except for how far the losses grow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 gefen==1.2.3 numba==0.68.1 numpy==2.4.6
cat > train.py <<'PYTHON'
import importlib.metadata
import sys

import torch
from gefen import Gefen
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

print("gefen", importlib.metadata.version("gefen"), "torch", torch.__version__, file=sys.stderr)


def train(inputs, outputs, optimizer_class, look_first, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(inputs, outputs, bias=False)
    target = torch.randn(outputs, inputs) / inputs**0.5
    optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.0, **options)
    if look_first:
        get_optimizer_state_dict(model, optimizer)
    losses = []
    for _ in range(1000):
        x = torch.randn(256, inputs)
        loss = (model(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    name = optimizer_class.__name__ + (" after get_optimizer_state_dict" if look_first else "")
    grows = losses[-1] > 1.5 * losses[0]
    line = f"{inputs} x {outputs} {name}: loss {'grows' if grows else f'{losses[-1]:.3f}'}"
    if optimizer_class is Gefen:
        line += f", {len(optimizer.state_dict()['gefen_codebook'].unique())} values"
    print("LINE", line + (f" ({losses[0]:.2f} to {losses[-1]:.0f})" if grows else ""))


for inputs, outputs, look_first in ((320, 16, False), (320, 16, True), (64, 64, False)):
    train(inputs, outputs, torch.optim.AdamW, look_first)
    train(inputs, outputs, Gefen, look_first, fused=False)
PYTHON
env/bin/python -W ignore train.py 2> log > out.txt || { tail -5 log >&2; exit 1; }
grep -m1 '^gefen' log
sed -n 's/^LINE //p' out.txt | tee lines.txt
cat > expected.txt <<'LINES'
320 x 16 AdamW: loss 0.000
320 x 16 Gefen: loss 0.000, 256 values
320 x 16 AdamW after get_optimizer_state_dict: loss 0.000
320 x 16 Gefen after get_optimizer_state_dict: loss grows, 3 values
64 x 64 AdamW: loss 0.000
64 x 64 Gefen: loss grows, 3 values
LINES
diff expected.txt <(sed 's/ (.*//' lines.txt)

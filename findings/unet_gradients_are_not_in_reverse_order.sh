#!/bin/bash
# diffusers 0.42.1 and torch 2.13.0, as released on PyPI.
#
# Gradients are often taken to come in the reverse of the order of model.parameters(): by whoever steps or frees them
# inside the backward pass, fills buckets of gradients, or fetches swapped blocks ahead of time. In UNet2DConditionModel
# the blocks of parameters() are not in the order of the forward pass: mid_block comes after up_blocks. Gradients of
# time_embedding, which every block uses, are whole at the very end. And within a block the order is another one nearly
# everywhere: the next gradient is that of the parameter before in one of four cases. Output seen, for a small model:
#
#   parameters: conv_in time_embedding down_blocks up_blocks mid_block conv_norm_out conv_out
#   gradients: conv_out conv_norm_out up_blocks mid_block down_blocks conv_in time_embedding
#   followed by that of the parameter before: 55 of 207
#
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
cat > run.py <<'PYTHON'
from itertools import groupby, pairwise

import torch
from diffusers import UNet2DConditionModel


def blocks(names):
    return " ".join(block for block, _ in groupby(name.partition(".")[0] for name in names))


torch.manual_seed(0)
model = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=8,
    attention_head_dim=8,
)
names, seen = [name for name, _ in model.named_parameters()], []
for name, p in model.named_parameters():
    p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
model(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 5, 32)).sample.sum().backward()
assert sorted(seen) == sorted(names)
before = dict(zip(names[1:], names))
followed = sum(before.get(name) == after for name, after in pairwise(seen))
print("parameters:", blocks(names))
print("gradients:", blocks(seen))
print("followed by that of the parameter before:", followed, "of", len(names) - 1)
PYTHON
env/bin/python run.py 2> errors.txt | tee lines.txt || { cat errors.txt >&2; exit 1; }
cat > expected.txt <<'LINES'
parameters: conv_in time_embedding down_blocks up_blocks mid_block conv_norm_out conv_out
gradients: conv_out conv_norm_out up_blocks mid_block down_blocks conv_in time_embedding
followed by that of the parameter before: 55 of 207
LINES
diff expected.txt lines.txt

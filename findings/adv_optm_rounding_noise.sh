#!/bin/bash
# adv_optm 2.5.16, torch 2.13.0.
#
# With bfloat16 weights adv_optm's optimizers round stochastically, by default. The noise does not come from torch's
# generator: it comes from one generator of the module for each device, which starts at 42, starts anew whenever any
# optimizer of the package is built, and is in no state_dict. So
#
# - torch.manual_seed has no influence: runs of different seeds have the same noise;
# - a run that is resumed with its optimizer's state and all of torch's random states draws the noise of its first steps
#   again, and ends elsewhere than the uninterrupted one;
# - building a second optimizer changes what the first one does next, although they share no parameter.
#
# With float32 weights there is no noise, and all runs below end at the same weights. Output seen:
#
#   torch.float32 other seed: 0 of 4096 differ, resumed: 0, second optimizer: 0
#   torch.bfloat16 other seed: 0 of 4096 differ, resumed: 192, second optimizer: 192
#
# Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 adv_optm==2.5.16 numpy==2.4.6
cat > rounding.py <<'PYTHON'
import io

import torch
from adv_optm import AdamW_adv


def build(dtype):
    p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    return p, AdamW_adv([p], lr=1e-4)


def step(p, optimizer, first, last):
    for number in range(first, last):
        p.grad = torch.randn(4096, generator=torch.Generator().manual_seed(number)).to(p.dtype)
        optimizer.step()


def straight(dtype, seed=0, second=False):
    torch.manual_seed(seed)
    p, optimizer = build(dtype)
    step(p, optimizer, 0, 4)
    if second:
        build(dtype)
    step(p, optimizer, 4, 8)
    return p


def resumed(dtype):
    torch.manual_seed(0)
    p, optimizer = build(dtype)
    step(p, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), torch.get_rng_state(), p.detach()], file)
    file.seek(0)
    again, optimizer = build(dtype)
    state, random_state, weights = torch.load(file)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random_state)
    again.data.copy_(weights)
    step(again, optimizer, 4, 8)
    return again


def differing(a, b):
    return int((a != b).sum())


for dtype in (torch.float32, torch.bfloat16):
    reference = straight(dtype)
    seed = differing(reference, straight(dtype, seed=1))
    after, beside = differing(reference, resumed(dtype)), differing(reference, straight(dtype, second=True))
    print(f"{dtype} other seed: {seed} of 4096 differ, resumed: {after}, second optimizer: {beside}")
    assert seed == 0
    assert (after > 100, beside > 100) == (dtype == torch.bfloat16,) * 2
    assert (after == 0, beside == 0) == (dtype == torch.float32,) * 2
PYTHON
env/bin/python rounding.py 2> log || { tail -5 log >&2; exit 1; }

#!/bin/bash
# bitsandbytes 0.50.2, torch 2.13.0, on a CPU (x86-64).
#
# `quantize_blockwise` does not choose the nearest code on a CPU. The codebook, `create_dynamic_map(signed=True)`, holds
# an exact 0 and values down to 5.5e-7, but a 0 in a block comes back as 2.125e-05 of the block's largest value, and so
# does everything that is smaller: 1e-6 comes back 21 times too large. With the unsigned map it is 1.5625e-05.
#
#   written            1.0, 0.0, 1e-06, 1e-05
#   signed, read       1.0, 2.125e-05, 2.125e-05, 2.125e-05        nearest 1.0, 0.0, 5.5e-07, 7.75e-06
#   unsigned, read     1.0, 1.5625e-05, 1.5625e-05, 1.5625e-05     nearest 1.0, 0.0, 7.75e-07, 8.875e-06
#
# Fails if what is read for 0 or 1e-6 changes, or if the codebook no longer holds something nearer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 bitsandbytes==0.50.2
cat > blockwise.py <<'PYTHON'
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

for signed in (True, False):
    code = create_dynamic_map(signed=signed)
    x = torch.zeros(256)
    x[:4] = torch.tensor([1.0, 0.0, 1e-6, 1e-5])
    codes, scale = quantize_blockwise(x, code=code, blocksize=256)
    read = dequantize_blockwise(codes, scale)
    nearest = code[(code[None] - x[:, None]).abs().argmin(1)]
    print("signed" if signed else "unsigned", "read", read[:4].tolist(), "nearest", nearest[:4].tolist())
    floor = 2.125e-05 if signed else 1.5625e-05
    assert 0.0 in code.tolist()
    assert (nearest[2] - 1e-6).abs() < 5e-7
    assert torch.allclose(read[1:].abs(), torch.full((255,), floor), rtol=1e-4)
PYTHON
env/bin/python blockwise.py 2> log || { tail -5 log >&2; exit 1; }

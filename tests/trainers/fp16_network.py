"""`tiny_network.py` with accelerate's gradient scaler, which accelerate itself uses on GPUs only.

So `--full_fp16` takes on a CPU the path it takes on a GPU: weights and gradients in float16, steps left out while the
scale is too large.
"""

import sys
from pathlib import Path

import library.train_util as train_util
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sd_scripts"))
import tiny_network

_prepare = train_util.prepare_accelerator


def prepare_with_scaler(args):
    accelerator = _prepare(args)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    accelerator.native_amp = True
    return accelerator


train_util.prepare_accelerator = prepare_with_scaler
tiny_network.run(sys.argv[1:])

"""One process of DeepSpeed through accelerate's config: with_deepspeed.py STAGE OPTIMIZER. Prints how a step ends."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DeepSpeedPlugin

import library.automagic_cameamp as family


def main(stage: int, name: str) -> None:
    """Take a step."""
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=1))
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = getattr(family, name)(model.parameters(), lr=1e-4)
    batches = torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    try:
        for batch in batches:
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        print(f"refused: {error}")
    else:
        print("trained")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

"""Train the base model on the digits 0 to 4 and write its weights. It takes a quarter of an hour on two cores.

python -m library.cameamp_demo.train_base
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from .data import BASE_DIGITS, held_out_batches, load, training_batch
from .model import BASE_WEIGHTS, TIMESTEPS, NoisePredictor, new_prompts, new_unet, save_base

SEED = 7
STEPS = 4000
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
EMA_DECAY = 0.999


def train(steps: int) -> tuple[NoisePredictor, float]:
    """Train from scratch.

    Returns:
        The averaged model and its held-out loss.
    """
    torch.manual_seed(SEED)
    model = NoisePredictor(new_unet(), new_prompts(SEED))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    data = load(BASE_DIGITS, held_out=False)
    progress = tqdm(range(steps))
    for number in progress:
        loss = model.loss(training_batch(data, BATCH_SIZE, TIMESTEPS, SEED, number))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        if number % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    trained = average.module
    assert isinstance(trained, NoisePredictor)
    with torch.no_grad():
        losses = [
            trained.loss(batch) for batch in held_out_batches(load(BASE_DIGITS, held_out=True), TIMESTEPS, repeats=4)
        ]
    return trained, torch.stack(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=BASE_WEIGHTS, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    args = parser.parse_args()
    model, held_out_loss = train(args.steps)
    facts = {"digits": "0-4", "seed": SEED, "steps": args.steps, "held_out_loss": f"{held_out_loss:.5f}"}
    save_base(model, args.output, {name: str(value) for name, value in facts.items()})
    print(f"held-out loss {held_out_loss:.5f}, {args.output.stat().st_size / 2**20:.2f} MiB in {args.output}")


if __name__ == "__main__":
    main()

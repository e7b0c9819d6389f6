"""Real images: the handwritten digits of scikit-learn, upscaled. A batch depends on a seed and its number alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RESOLUTION = 16
HELD_OUT_SHARE = 0.2

# The base model knows the first five digits; a LoRA teaches it the others.
BASE_DIGITS = (0, 1, 2, 3, 4)
NEW_DIGITS = (5, 6, 7, 8, 9)

# The same split in every run; otherwise a base model could have seen the images on which a LoRA is tested.
_SPLIT_SEED = 20240607


class NoisyBatch(NamedTuple):
    """The inputs of one training step.

    Attributes:
        images: (batch, 1, 16, 16) in [-1, 1].
        digits: (batch,) int64.
        noise: like images.
        timesteps: (batch,) int64.
    """

    images: Tensor
    digits: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 16, 16) in [-1, 1] and their digits (n,)."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load(digits: tuple[int, ...], held_out: bool) -> Digits:
    """The images of some digits, either those to train on or those held out."""
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.from_numpy(source.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(source.target).long()
    images = torch.nn.functional.interpolate(small, size=RESOLUTION, mode="bilinear", align_corners=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    border = int(len(order) * HELD_OUT_SHARE)
    chosen = order[:border] if held_out else order[border:]
    chosen = chosen[torch.isin(labels[chosen], torch.tensor(digits))]
    return Digits(images[chosen], labels[chosen])


def training_batch(data: Digits, size: int, timesteps: int, seed: int, number: int) -> NoisyBatch:
    """Batch `number` of the run with this seed: the same at every call and in every process, as resuming needs."""
    generator = torch.Generator().manual_seed(_stream(seed, number))
    chosen = torch.randint(len(data), (size,), generator=generator)
    return _with_noise(data.images[chosen], data.digits[chosen], timesteps, generator)


def held_out_batches(data: Digits, timesteps: int, repeats: int) -> list[NoisyBatch]:
    """All images, `repeats` times, with the same noise and timesteps at every call. Timesteps are spread evenly."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    batches = []
    for _ in range(repeats):
        batch = _with_noise(data.images, data.digits, timesteps, generator)
        even = (torch.arange(len(data)) + 0.5) / len(data) * timesteps
        batches.append(batch._replace(timesteps=even.long()[torch.randperm(len(data), generator=generator)]))
    return batches


def _with_noise(images: Tensor, digits: Tensor, timesteps: int, generator: torch.Generator) -> NoisyBatch:
    noise = torch.randn(images.shape, generator=generator)
    return NoisyBatch(images, digits, noise, torch.randint(timesteps, (len(images),), generator=generator))


def _stream(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63

"""The embedded fine-tune as a task: a diffusion model that knows the digits 0 to 4 learns 5 to 9."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.cameamp_demo.data import NEW_DIGITS, Digits, NoisyBatch, held_out_batches, load, training_batch
from library.cameamp_demo.model import TIMESTEPS, load_base
from library.cameamp_demo.network import LoRANetwork

from .task import Named


class _NewDigits:
    """The digits 5 to 9, and a loss on those of them that are held out.

    Args:
        seed: of the batches.
        batch_size: images in a batch.
        repeats: how often each held-out image is used, with different noise each time.
        images: number of held-out images that are used; None for all.
        digits: which of the digits.
    """

    _network: Callable[[NoisyBatch], Tensor]

    def __init__(
        self,
        seed: int,
        batch_size: int,
        repeats: int = 1,
        images: int | None = None,
        digits: tuple[int, ...] = NEW_DIGITS,
    ) -> None:
        self._seed, self._batch_size = seed, batch_size
        self._data = load(digits, held_out=False)
        held_out = load(digits, held_out=True)
        held_out = Digits(held_out.images[:images], held_out.digits[:images])
        self._held_out = held_out_batches(held_out, TIMESTEPS, repeats)

    def loss(self, number: int) -> Tensor:
        """The loss of a batch."""
        return self._network(training_batch(self._data, self._batch_size, TIMESTEPS, self._seed, number))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss on the held-out images, on fixed noise and timesteps."""
        return torch.stack([self._network(batch) for batch in self._held_out]).mean().item()


class DigitsLoRA(_NewDigits):
    """The embedded trainer's model, data and initial weights.

    Args:
        seed: of the LoRA's initial weights and of the batches.
        rank: rank of the LoRA, and its alpha.
        batch_size: images in a batch.
        repeats: how often each held-out image is used, with different noise each time.
        images: number of held-out images that are used; None for all.
        digits: which of the digits.

    Attributes:
        lora: the LoRA.
    """

    def __init__(
        self,
        seed: int,
        rank: int,
        batch_size: int,
        repeats: int = 1,
        images: int | None = None,
        digits: tuple[int, ...] = NEW_DIGITS,
    ) -> None:
        super().__init__(seed, batch_size, repeats, images, digits)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = load_base()
            self._rank = rank
            self.lora = LoRANetwork(base, rank, rank)
        self._base = base  # the network itself does not own it
        self._network = self.lora

    def named_parameters(self) -> Named:
        """The factors."""
        return list(self.lora.named_parameters())

    def add(self, lora: LoRANetwork) -> None:
        """Let the model have a second LoRA of the same rank, too."""
        LoRANetwork(self._base, self._rank, self._rank).load_state_dict(lora.state_dict())


class AllOfDigits(_NewDigits):
    """The same model and data, and all weights of the model to train."""

    def __init__(self, seed: int, batch_size: int, repeats: int = 1, images: int | None = None) -> None:
        super().__init__(seed, batch_size, repeats, images)
        self._base = load_base()
        self._base.unet.requires_grad_(True)
        self._network = self._base.loss

    def named_parameters(self) -> Named:
        """All weights of the U-Net."""
        return list(self._base.unet.named_parameters())

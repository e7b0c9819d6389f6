"""A LoRA in kohya's format: down and up factors beside the attention layers, with the keys that its tools expect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .data import NoisyBatch
from .model import NoisePredictor

_PREFIX = "lora_unet"
# Layers inside these modules get a LoRA, as in sd-scripts' networks/lora.py.
_TARGET = "Transformer2DModel"


class LoRAModule(nn.Module):
    """The low-rank change of one linear or convolution layer.

    Args:
        layer: the layer; once `apply_to` is called, its forward adds the output of this module.
        rank: rank of the change.
        alpha: the change is scaled by alpha / rank.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            window: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
            self.lora_down: nn.Module = nn.Conv2d(layer.in_channels, rank, **window, bias=False)
            self.lora_up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        nn.init.zeros_(self.lora_up.weight)
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self._scale = alpha / rank
        self._layer_forward = layer.forward

    def apply_to(self, layer: nn.Module) -> None:
        """Add the change to the layer's output from now on."""
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with its change."""
        return self._layer_forward(x) + self.lora_up(self.lora_down(x)) * self._scale


class LoRANetwork(nn.Module):
    """A LoRA of the base model. Its parameters are the factors alone; the base model is frozen and not a part of it.

    Args:
        base: the base model; its attention layers are changed.
        rank: rank of every change.
        alpha: scale of every change, times the rank.
    """

    def __init__(self, base: NoisePredictor, rank: int, alpha: float) -> None:
        super().__init__()
        # In a tuple, so that the weights of the base model do not become parameters of this module.
        self._base = (base,)
        for name, layer in _target_layers(base.unet):
            module = LoRAModule(layer, rank, alpha)
            module.apply_to(layer)
            self.add_module(f"{_PREFIX}_{name.replace('.', '_')}", module)

    def forward(self, batch: NoisyBatch) -> Tensor:
        """The loss of a batch, 0-d."""
        return self._base[0].loss(batch)

    def parameter_groups(self) -> list[dict]:
        """The parameters to train, as an optimizer takes them."""
        return [{"params": list(self.parameters())}]


def _target_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for parent_name, parent in unet.named_modules():
        if type(parent).__name__ == _TARGET:
            for name, layer in parent.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    yield f"{parent_name}.{name}", layer

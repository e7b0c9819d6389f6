"""The base model: a small U-Net that predicts noise, conditioned on the digit through cross-attention."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import RESOLUTION, NoisyBatch

BASE_WEIGHTS = Path(__file__).with_name("base_digits_0_to_4.safetensors")
TIMESTEPS = 1000
_PROMPT_TOKENS = 4
_PROMPT_WIDTH = 32
_PROMPT_KEY = "prompts"


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_PROMPT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_prompts(seed: int) -> Tensor:
    """A random embedding for each of the ten digits, (10, tokens, width). It stands in for a frozen text encoder."""
    return torch.randn(10, _PROMPT_TOKENS, _PROMPT_WIDTH, generator=torch.Generator().manual_seed(seed))


def noise_scheduler() -> DDPMScheduler:
    """The noise schedule of training and sampling."""
    return DDPMScheduler(num_train_timesteps=TIMESTEPS, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


class NoisePredictor(nn.Module):
    """The U-Net with its prompts. It predicts the noise in images of given digits.

    Args:
        unet: the U-Net.
        prompts: (10, tokens, width).
    """

    def __init__(self, unet: UNet2DConditionModel, prompts: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.prompts: Tensor
        self.register_buffer("prompts", prompts)
        self.schedule = noise_scheduler()

    def forward(self, noisy: Tensor, timesteps: Tensor, digits: Tensor) -> Tensor:
        """Predicted noise, (batch, 1, 16, 16)."""
        prompts = self.prompts[digits]
        return self.unet(noisy, timesteps, encoder_hidden_states=prompts).sample

    def loss(self, batch: NoisyBatch) -> Tensor:
        """Mean squared error of the predicted noise, 0-d float32."""
        noisy = self.schedule.add_noise(batch.images, batch.noise, batch.timesteps)
        return nn.functional.mse_loss(self(noisy, batch.timesteps, batch.digits).float(), batch.noise)


def save_base(model: NoisePredictor, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights, at half precision, and the prompts."""
    tensors = {name: value.detach().half().contiguous() for name, value in model.unet.state_dict().items()}
    save_file({**tensors, _PROMPT_KEY: model.prompts.half()}, str(path), metadata=metadata)


def load_base(path: Path = BASE_WEIGHTS) -> NoisePredictor:
    """The trained base model, in float32, frozen.

    Raises:
        FileNotFoundError: the file of the weights does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the base model's weights are missing: {path}")
    tensors = {name: value.float() for name, value in load_file(str(path)).items()}
    prompts = tensors.pop(_PROMPT_KEY)
    unet = new_unet()
    unet.load_state_dict(tensors)
    unet.requires_grad_(False)
    return NoisePredictor(unet, prompts)


def base_metadata(path: Path = BASE_WEIGHTS) -> dict[str, str]:
    """How the base model was trained."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})

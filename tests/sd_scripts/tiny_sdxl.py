"""sd-scripts' own sdxl_train.py around models of a few thousand weights: its flow, with several optimizers, in seconds.

Noise and timesteps depend on the number of the batch alone, counted from `--first_batch`, so that a resumed run can
see what an uninterrupted one would have seen. The trained weights are written as `a.safetensors`.
"""

import sys

import library.sdxl_train_util as sdxl_train_util
import library.train_util as train_util
import sdxl_train
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


class TinyUnet(torch.nn.Module):
    """Takes and gives what SDXL's takes and gives."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.text = torch.nn.Linear(64, 8)
        self.sizes = torch.nn.Linear(32 + 6 * 256, 8)
        self.outer = torch.nn.Conv2d(8, 4, 3, padding=1)

    def set_use_memory_efficient_attention(self, xformers, mem_eff):
        pass

    def set_use_sdpa(self, sdpa):
        pass

    def forward(self, x, timesteps, context, y):
        h = self.inner(x) + (self.text(context).mean(1) + self.sizes(y))[:, :, None, None]
        return self.outer(torch.tanh(h))


def load_target_model(args, accelerator, model_version, weight_dtype):
    torch.manual_seed(3)
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2, vocab_size=49408,
        projection_dim=32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.set_use_memory_efficient_attention_xformers = lambda valid: None
    return True, CLIPTextModel(text), CLIPTextModelWithProjection(text), vae, TinyUnet(), None, None


def save_weights(args, *things):
    unet = next(thing for thing in things if isinstance(thing, TinyUnet))
    save_file(unet.state_dict(), f"{args.output_dir}/{args.output_name}.safetensors")


def seeded_by_batch(first):
    original, number = train_util.get_noise_noisy_latents_and_timesteps, first

    def get_noise(*arguments):
        nonlocal number
        torch.manual_seed(number)
        number += 1
        return original(*arguments)

    return get_noise


if __name__ == "__main__":
    parser = sdxl_train.setup_parser()
    parser.add_argument("--first_batch", type=int, default=0)
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    sdxl_train_util.load_target_model = load_target_model
    sdxl_train_util.save_sd_model_on_train_end = save_weights
    train_util.get_noise_noisy_latents_and_timesteps = seeded_by_batch(args.first_batch)
    sdxl_train.train(args)
    print("trained by", sys.argv[0])

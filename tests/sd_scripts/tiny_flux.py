"""sd-scripts' own flux_train.py around a Flux of a few thousand weights: an optimizer for each block, in seconds.

Noise and timesteps depend on the number of the batch alone, counted from `--first_batch`, so that a resumed run can
see what an uninterrupted one would have seen. The trained weights are written as `a.safetensors`.
"""

import sys

import flux_train
import library.flux_train_utils as flux_train_utils
import library.flux_utils as flux_utils
import library.strategy_flux as strategy_flux
import library.train_util as train_util
import torch
from library.flux_models import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

WIDTH = 32


def flow_model(*arguments, **options):
    torch.manual_seed(3)
    return False, Flux(
        FluxParams(
            in_channels=64,
            vec_in_dim=WIDTH,
            context_in_dim=WIDTH,
            hidden_size=48,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=2,
            axes_dim=[8, 8, 8],
            theta=10_000,
            qkv_bias=True,
            guidance_embed=True,
        )
    )


def autoencoder(*arguments, **options):
    return AutoEncoder(
        AutoEncoderParams(
            resolution=64,
            in_channels=3,
            ch=32,
            out_ch=3,
            ch_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            z_channels=16,
            scale_factor=1.0,
            shift_factor=0.0,
        )
    )


def clip(*arguments, **options):
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
        )
    )


def t5(*arguments, **options):
    return T5EncoderModel(T5Config(d_model=WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=99))


class Tokens(strategy_flux.FluxTokenizeStrategy):
    def __init__(self, *arguments, **options):
        pass

    def tokenize(self, text):
        ids = torch.arange(1, 9).unsqueeze(0)
        return [ids, ids, torch.ones_like(ids)]


def save_weights(args, dtype, epoch, step, flux):
    save_file(flux.state_dict(), f"{args.output_dir}/{args.output_name}.safetensors")


def seeded_by_batch(first):
    """What encodes the text, which comes right before the noise is drawn."""
    original, number = strategy_flux.FluxTextEncodingStrategy.encode_tokens, first

    def encode_tokens(*arguments, **options):
        nonlocal number
        torch.manual_seed(number)
        number += 1
        return original(*arguments, **options)

    return encode_tokens


if __name__ == "__main__":
    parser = flux_train.setup_parser()
    parser.add_argument("--first_batch", type=int, default=0)
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    flux_utils.analyze_checkpoint_state = lambda path: (False, False, (1, 2), [])
    flux_utils.load_flow_model, flux_utils.load_ae = flow_model, autoencoder
    flux_utils.load_clip_l, flux_utils.load_t5xxl = clip, t5
    strategy_flux.FluxTokenizeStrategy = Tokens
    strategy_flux.FluxTextEncodingStrategy.encode_tokens = seeded_by_batch(args.first_batch)
    flux_train_utils.save_flux_model_on_train_end = save_weights
    flux_train.train(args)
    print("trained by", sys.argv[0])

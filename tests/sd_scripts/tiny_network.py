"""sd-scripts' own network trainer around models of a few thousand weights: its loop, options and states, in seconds.

Runs inside sd-scripts, as its training scripts do. `--runs FILE` makes several runs in one process: a JSON list of
argument lists. Every batch is the same, and noise and timesteps depend on the number of the batch alone, counted from
`--first_batch`, so that a resumed run can see what an uninterrupted one would have seen.
"""

import hashlib
import json
import multiprocessing
import sys

import library.strategy_base as strategies
import library.train_util as train_util
import torch
import train_network
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


class TinyTrainer(train_network.NetworkTrainer):
    def load_target_model(self, args, weight_dtype, accelerator):
        torch.manual_seed(3)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
        )  # fmt: skip
        text = CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408
        )
        return "tiny", CLIPTextModel(text), vae, unet

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        self.network, self.number, self.accelerator = network, args.first_batch, accelerator

    def process_batch(self, *arguments, **options):
        torch.manual_seed(1000 * self.accelerator.process_index + self.number)
        self.number += 1
        return super().process_batch(*arguments, **options)


def run(arguments):
    forget_earlier_runs()
    sys.argv[1:] = arguments
    parser = train_network.setup_parser()
    parser.add_argument("--first_batch", type=int, default=0)
    parser.add_argument("--spawn_workers", action="store_true")
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    if args.spawn_workers:
        multiprocessing.set_start_method("spawn")
    trainer = TinyTrainer()
    trainer.train(args)
    if multiprocessing.get_start_method() == "spawn":
        print("workers were spawned")
    weights = b"".join(p.detach().float().numpy().tobytes() for p in trainer.network.parameters())
    print(f"rank {trainer.accelerator.process_index} ends with {hashlib.sha256(weights).hexdigest()}", flush=True)


def forget_earlier_runs():
    AcceleratorState._reset_state(reset_partial_state=True)
    for kind in ("Tokenize", "TextEncoding", "LatentsCaching", "TextEncoderOutputsCaching"):
        getattr(strategies, f"{kind}Strategy")._strategy = None


if __name__ == "__main__":
    if sys.argv[1] == "--runs":
        with open(sys.argv[2], encoding="utf-8") as file:
            for arguments in json.load(file):
                run(arguments)
    else:
        run(sys.argv[1:])

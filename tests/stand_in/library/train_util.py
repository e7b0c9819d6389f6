"""The few functions of sd-scripts that the plugin meets, of the same names and behaviour, and nothing of its code."""

import argparse
import ast
import importlib
import os
import sys

import toml
import torch
from accelerate import Accelerator


def setup_parser():
    parser = argparse.ArgumentParser()
    for name in (
        "config_file", "optimizer_type", "logging_dir", "resume", "output_dir", "huggingface_token", "wandb_api_key",
    ):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("deepspeed", "fused_backward_pass", "skip_until_initial_step"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--optimizer_args", nargs="*")
    parser.add_argument("--learning_rate", type=float, default=2e-6)
    for name in ("unet_lr", "learning_rate_te1"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--text_encoder_lr", type=float, nargs="*")
    parser.add_argument("--block_lr")
    parser.add_argument("--initial_step", type=int)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--fused_optimizer_groups", type=int)
    parser.add_argument("--max_data_loader_n_workers", type=int, default=0)
    return parser


def read_config_from_file(args, parser):
    if not args.config_file:
        return args
    document = toml.load(args.config_file if args.config_file.endswith(".toml") else args.config_file + ".toml")
    flat = {}
    for name, value in document.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return parser.parse_args(namespace=argparse.Namespace(**flat))


def get_optimizer(args, trainable_params):
    if (args.optimizer_type or "AdamW").lower() == "adamw":
        optimizer_class, options = torch.optim.AdamW, {}
    else:
        module, _, name = args.optimizer_type.rpartition(".")
        optimizer_class = getattr(importlib.import_module(module or "torch.optim"), name)
        options = {k: ast.literal_eval(v) for k, v in (word.split("=") for word in args.optimizer_args or [])}
    optimizer = optimizer_class(trainable_params, lr=args.learning_rate, **options)
    name = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return name, ",".join(f"{k}={v}" for k, v in options.items()), optimizer


def prepare_accelerator(args):
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard" if args.logging_dir else None,
        project_dir=args.logging_dir,
    )


class Numbers(torch.utils.data.Dataset):
    """Random inputs; in a worker process it also says what the worker can import."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        optimizers = importlib.import_module(os.environ.get("WORKERS_IMPORT", "library.automagic_cameamp"))
        found = [optimizers.__file__, sys.modules[__name__].__file__, str(os.getpid())]
        return torch.randn(6, generator=torch.Generator().manual_seed(index)), found

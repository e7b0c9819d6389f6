"""musubi-tuner's own optimizer, scheduler, network and state code around a model of a few thousand weights.

`FILE` is a JSON list of runs, all made in this process: for each the options of musubi-tuner's parser. Only loading the
model, the data and the loss are not its own: a batch depends on the number of the step alone, so that a resumed run can
see what an uninterrupted one would have seen.
"""

import importlib
import json
import sys

import torch
from accelerate.state import AcceleratorState
from musubi_tuner.training.accelerator_setup import prepare_accelerator
from musubi_tuner.training.parser_common import setup_parser_common
from musubi_tuner.training.trainer_base import NetworkTrainer
from musubi_tuner.utils.train_utils import save_state_on_train_end


class ZImageTransformerBlock(torch.nn.Module):
    """Known to musubi-tuner's networks by its name."""

    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(48, 48)
        self.w1 = torch.nn.Linear(48, 128)
        self.w2 = torch.nn.Linear(128, 48)

    def forward(self, x):
        return x + self.w2(torch.tanh(self.w1(self.to_q(x))))


class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, number):
        return number

    def set_max_train_steps(self, steps):
        self.steps = steps


def run(arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    args = setup_parser_common().parse_args(arguments)
    accelerator = prepare_accelerator(args)
    trainer = NetworkTrainer()
    trainer.blocks_to_swap = None
    torch.manual_seed(3)
    transformer = torch.nn.Sequential(ZImageTransformerBlock(), ZImageTransformerBlock()).requires_grad_(False)
    options = dict(word.split("=") for word in args.network_args or ())
    module = importlib.import_module(args.network_module)
    network = module.create_arch_network(1.0, args.network_dim, None, None, None, transformer, **options)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    optimizer, name, _, train, evaluate, scheduler, _, data = trainer._build_optimizer_and_dataloader(
        args, accelerator, network, Steps(), lambda batch: batch[0], transformer
    )
    transformer, network, optimizer, data, scheduler, model, _ = trainer._prepare_with_accelerator(
        args, accelerator, transformer, network, optimizer, data, scheduler, torch.float32, torch.float32, None
    )
    trainer._register_hooks_and_resume(args, accelerator, network)
    own = optimizer.optimizer
    first = max((state["step"] for state in own.state.values()), default=0)
    train()
    for number in range(first, args.max_train_steps):
        torch.manual_seed(1000 + number)
        with accelerator.accumulate(model):
            loss = transformer(torch.randn(8, 48)).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.get_trainable_params(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    evaluate()
    save_state_on_train_end(args, accelerator)
    network.save_weights(f"{args.output_dir}/a.safetensors", None, None)
    found = {"name": name, "factors": len(own._parameters.factors), "parameters": len(own._parameters)}
    with open(f"{args.output_dir}/run.json", "w", encoding="utf-8") as file:
        json.dump({**found, "betas": own.config.betas}, file)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        for arguments in json.load(file):
            run(arguments)

"""A training script as sd-scripts has them: parse, read the configuration, build, prepare, loop, log."""

import logging
import multiprocessing

import library.train_util as train_util
import torch
from diffusers.optimization import get_scheduler
from tqdm import tqdm


class Factors(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lora_down = torch.nn.Linear(6, 2, bias=False)
        self.lora_up = torch.nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return x + self.lora_up(self.lora_down(x))


def train(args):
    accelerator = train_util.prepare_accelerator(args)
    print("loading the model")
    network = Factors()
    rate = args.learning_rate if args.unet_lr is None else args.unet_lr
    groups = [
        {"params": network.lora_down.parameters(), "lr": rate},
        {"params": network.lora_up.parameters(), "lr": 2 * rate},
    ]
    name, options, optimizer = train_util.get_optimizer(args, groups)
    steps = args.max_train_steps * accelerator.num_processes
    scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=steps)
    loader = torch.utils.data.DataLoader(
        train_util.Numbers(), batch_size=4, num_workers=args.max_data_loader_n_workers,
        multiprocessing_context="spawn" if args.max_data_loader_n_workers else None,
    )  # fmt: skip
    network, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    if args.resume:
        accelerator.load_state(args.resume)
    accelerator.init_trackers("stand_in")
    accelerator.log({}, step=0)
    progress = tqdm(range(args.max_train_steps))
    step, files = 0, set()
    while step < args.max_train_steps:
        for x, found in loader:
            files.update(zip(*found))
            with accelerator.accumulate(network):
                loss = (network(x) - x.roll(1, 1)).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                progress.update()
            progress.set_postfix(avr_loss=loss.item())
            lrs = scheduler.get_last_lr()
            # The first group once more under other names, as the host does.
            logs = {"lr/unet": lrs[0], "lr/unet plus": lrs[1], "lr/textencoder": lrs[0], "lr/group1": lrs[1]}
            accelerator.log({"loss": loss.item(), **logs}, step=step)
            if step == args.max_train_steps:
                break
    accelerator.end_training()
    print(f"ss_optimizer {name}({options})")
    for file in sorted(files):
        print("imported", *file, multiprocessing.get_start_method())
    if args.output_dir:
        accelerator.save_state(args.output_dir)


def setup_parser():
    parser = train_util.setup_parser()
    parser.add_argument("--network_module")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    parser = setup_parser()
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    train(args)

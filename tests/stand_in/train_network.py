"""A training script as sd-scripts has them: parse, read the configuration, build, prepare, loop, log."""

import logging
import multiprocessing

import library.train_util as train_util
import torch
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
    groups = [
        {"params": network.lora_down.parameters(), "lr": args.learning_rate},
        {"params": network.lora_up.parameters(), "lr": 2 * args.learning_rate},
    ]
    name, options, optimizer = train_util.get_optimizer(args, groups)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
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
            accelerator.log({"loss": loss.item(), "lr/unet": scheduler.get_last_lr()[0]}, step=step)
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

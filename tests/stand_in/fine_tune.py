"""A full fine-tuning script: no network, one optimizer a layer, each stepping inside the backward pass."""

import logging

import library.train_util as train_util
import torch

parser = train_util.setup_parser()

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    accelerator = train_util.prepare_accelerator(args)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
    optimizers = [
        train_util.get_optimizer(
            args, trainable_params=[{"params": list(layer.parameters()), "lr": args.learning_rate}]
        )[2]
        for layer in model
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step) for optimizer in optimizers]
    model = accelerator.prepare(model)
    # The others are prepared when the state has been loaded.
    prepared = [accelerator.prepare(optimizers[0])]
    prepared_schedulers = [accelerator.prepare(schedulers[0])]
    if args.resume:
        accelerator.load_state(args.resume)
    prepared += [accelerator.prepare(optimizer) for optimizer in optimizers[1:]]
    prepared_schedulers += [accelerator.prepare(scheduler) for scheduler in schedulers[1:]]
    for layer, own in zip(model, prepared):

        def step(p, optimizer=own):
            optimizer.step()
            optimizer.zero_grad()

        layer.weight.register_post_accumulate_grad_hook(step)
    print("training begins")
    accelerator.init_trackers("stand_in")
    for number in range(args.max_train_steps):
        x = torch.randn(4, 6)
        accelerator.backward((model(x) - x).square().mean())
        for scheduler in prepared_schedulers:
            scheduler.step()
        accelerator.log({"loss": 0.0, "lr/unet": 1e-4}, step=number + 1)
    for optimizer in optimizers:
        print(
            "full_finetune",
            optimizer.config.full_finetune,
            "names",
            sorted(name for group in optimizer._groups for name in group.names if name),
        )
    print("losses", [len(optimizer.c_optim.loss_history) for optimizer in optimizers])
    accelerator.end_training()
    if args.output_dir:
        accelerator.save_state(args.output_dir)

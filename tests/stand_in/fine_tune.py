"""A full fine-tuning script: no network, one optimizer a layer, each stepping inside the backward pass."""

import library.train_util as train_util
import torch

parser = train_util.setup_parser()

if __name__ == "__main__":
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    accelerator = train_util.prepare_accelerator(args)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
    optimizers = [
        train_util.get_optimizer(args, trainable_params=[{"params": list(layer.parameters()), "lr": 1e-4}])[2]
        for layer in model
    ]
    model = accelerator.prepare(model)
    for layer, prepared in zip(model, [accelerator.prepare(optimizer) for optimizer in optimizers]):

        def step(p, optimizer=prepared):
            optimizer.step()
            optimizer.zero_grad()

        layer.weight.register_post_accumulate_grad_hook(step)
    accelerator.init_trackers("stand_in")
    for number in range(args.max_train_steps):
        x = torch.randn(4, 6)
        accelerator.backward((model(x) - x).square().mean())
        accelerator.log({"loss": 0.0, "lr/unet": 1e-4}, step=number + 1)
    for optimizer in optimizers:
        print("full_finetune", optimizer.config.full_finetune, "names", sorted(optimizer._parameters.names.values()))
    print("losses", [len(optimizer.c_optim.loss_history) for optimizer in optimizers])
    accelerator.end_training()

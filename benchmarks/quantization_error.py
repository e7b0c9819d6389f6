"""How far 8-bit codes are from the states of a real run, in what the update uses, for several codes of each state.

    python -m benchmarks.quantization_error

A LoRA of the embedded model is trained with 32-bit states; at a few steps each state is coded and decoded in every way.
The error is relative, ||decoded - exact|| / ||exact||: of exp_avg, s and the mask themselves, and of 1 / sqrt(x) for
the second moment and the residual, by whose root the update divides. `lost` counts the non-zero elements that decode
to 0.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from library.cameamp.rounding import Dither
from library.cameamp.storage.blockwise import Blockwise, block_of
from library.cameamp.storage.linear import Linear
from library.cameamp_demo.options import parse
from library.cameamp_demo.trainer import Trainer

_STATES = ("exp_avg", "s", "exp_avg_sq", "exp_avg_res", "lr_mask")
_ROOTS = ("exp_avg_sq", "exp_avg_res")
Coder = Callable[[Tensor], Tensor]


def coders(name: str, bounds: tuple[float, float]) -> dict[str, Coder]:
    """For one state, each way of coding it: from a float32 tensor to the one that would be read back."""
    signed = name in ("exp_avg", "s")

    def ours(storage_for: Callable[[int], Blockwise | Linear]) -> Coder:
        def code(x: Tensor) -> Tensor:
            dither = Dither(torch.zeros(1, dtype=torch.int32), 1)
            storage = storage_for(block_of(x.numel(), 4096) or 64)
            buffers = storage.allocate(name, x.shape, 1, 0.0, dither)
            storage.write(name, buffers, x.clone().view(1, 1, -1), dither)
            return storage.read(name, buffers, 1, x.numel()).view_as(x)

        return code

    def linear_blocks(x: Tensor) -> Tensor:
        blocks = x.view(-1, block_of(x.numel(), 4096) or 64)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        levels = 127 if signed else 255
        return ((blocks / torch.where(scale > 0, scale, 1.0) * levels).round() / levels * scale).view_as(x)

    def bitsandbytes_default(x: Tensor) -> Tensor:
        block = block_of(x.numel(), 4096) or 64
        codes, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed=signed), blocksize=block)
        return bnb.dequantize_blockwise(codes, state)

    ways: dict[str, Coder] = {"linear in blocks": linear_blocks, "bitsandbytes": bitsandbytes_default}
    if name in _ROOTS:
        ways["dynamic, exact codes"] = ours(lambda block: Blockwise(False, False, block))
        ways["dynamic, of the root *"] = ours(lambda block: Blockwise(False, True, block))
    elif name == "lr_mask":
        ways["dynamic, exact codes"] = ours(lambda block: Blockwise(False, False, block))
        ways["linear over bounds, dithered *"] = ours(lambda block: Linear(*bounds))  # noqa: ARG005 - even steps need no blocks
    else:
        ways["dynamic, exact codes *"] = ours(lambda block: Blockwise(True, False, block))
    return ways


def relative_error(name: str, decoded: Tensor, exact: Tensor) -> float:
    """Error of what the update uses; an element decoded as 0 divides by the floor of one step's residual."""
    used = exact.abs() > 0
    a, b = decoded[used].double(), exact[used].double()
    if name in _ROOTS:
        a, b = a.clamp_min(1e-3 * b.max().item() * 1e-12).rsqrt(), b.rsqrt()
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of the run; the warm-up is half of them")
    args = parser.parse_args()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(parse([
            "--output_dir", folder, "--learning_rate", "1e-4", "--network_dim", "128", "--network_alpha", "128",
            "--optimizer_args", f"warmup_steps={args.steps // 2}",
        ]))  # fmt: skip
        optimizer = trainer.optimizer.optimizer
        print("what 0 decodes as in a block whose largest element is 1:", what_zero_becomes())
        print(f"{'step':>5} {'state':12} {'code (* is used)':32} {'relative error':>15} {'lost':>8}")
        for number in range(1, args.steps + 1):
            trainer._train_step()
            if number in (10, args.steps // 4, args.steps // 2 - 1, args.steps):
                report(number, optimizer)


def what_zero_becomes() -> str:
    """0 through bitsandbytes' own kernel of this device, and through ours."""
    block = torch.zeros(4096)
    block[0] = 1.0
    results = {way: code(block)[1].item() for way, code in coders("exp_avg", (0.0, 1.0)).items()}
    return ", ".join(f"{way} {value:.2g}" for way, value in results.items())


def report(number: int, optimizer: torch.optim.Optimizer) -> None:
    """Print the errors of all states of all large parameters."""
    group = optimizer.param_groups[0]
    for name in _STATES:
        values = [s[name] for p, s in optimizer.state.items() if name in s and p.numel() >= 4096]
        if not values:
            continue
        for way, code in coders(name, (group["min_lr"], group["max_lr"])).items():
            decoded = [code(value) for value in values]
            errors = [relative_error(name, d, value) for d, value in zip(decoded, values)]
            lost = sum(((d == 0) & (value != 0)).sum().item() for d, value in zip(decoded, values))
            count = sum((value != 0).sum().item() for value in values)
            mean = sum(errors) / len(errors)
            print(f"{number:5} {name:12} {way:32} {mean:15.4%} {lost / max(count, 1):8.2%}", flush=True)


if __name__ == "__main__":
    main()

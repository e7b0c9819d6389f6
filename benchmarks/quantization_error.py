"""How far are 8-bit codes from the states that they stand for?

A LoRA of the embedded model is trained with 32-bit states. At four steps every state is coded and decoded in several
ways. The error is relative, ||decoded - exact|| / ||exact||, of what the update uses: of exp_avg, s and the mask
themselves, and of 1 / sqrt(x) for the second moment and the residual. `lost` is the share of the non-zero elements that
decode to 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from library.cameamp.rounding import Dither
from library.cameamp.storage import Format
from library.cameamp.storage.blockwise import Blockwise, block_of
from library.cameamp.storage.linear import Linear

from .arguments import add_shared
from .embedded import embedded_trainer
from .table import Table

_STATES = ("exp_avg", "s", "exp_avg_sq", "exp_avg_res", "lr_mask")
_ROOTS = ("exp_avg_sq", "exp_avg_res")
Coder = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_shared(parser, steps=200)


def run(args: argparse.Namespace) -> None:
    """Train, code and print."""
    with embedded_trainer(128, args.steps // 2, "--learning_rate", "1e-4") as trainer:
        optimizer = trainer.optimizer.optimizer
        print("what 0 decodes as in a block whose largest element is 1:", what_zero_becomes())
        table = Table(
            "{:>5} {:<12} {:<32} {:>15.4%} {:>8.2%}", "step", "state", "code (* is used)", "relative error", "lost"
        )
        for number in range(1, args.steps + 1):
            trainer._train_step()
            if number in (10, args.steps // 4, args.steps // 2 - 1, args.steps):
                for row in errors(optimizer):
                    table.row(number, *row)


def coders(name: str, bounds: tuple[float, float]) -> dict[str, Coder]:
    """Each way of coding a state: a function from a float32 tensor to the tensor that is read back."""
    signed = name in ("exp_avg", "s")

    def stored(format_for: Callable[[int], Format]) -> Coder:
        def code(x: Tensor) -> Tensor:
            state = format_for(block_of(x.numel(), 4096) or 64).new(1, x.shape, x.device)
            state.write(x.clone().view(1, state.rows, state.columns), Dither(torch.zeros(1, dtype=torch.int32), 1))
            return state.read().view_as(x)

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
        ways["dynamic, exact codes"] = stored(lambda block: Blockwise(False, False, block))
        ways["dynamic, of the root *"] = stored(lambda block: Blockwise(False, True, block))
    elif name == "lr_mask":
        ways["dynamic, exact codes"] = stored(lambda block: Blockwise(False, False, block))
        ways["linear over bounds, dithered *"] = stored(lambda block: Linear(*bounds))  # noqa: ARG005 - even steps need no blocks
    else:
        ways["dynamic, exact codes *"] = stored(lambda block: Blockwise(True, False, block))
    return ways


def relative_error(name: str, decoded: Tensor, exact: Tensor) -> float:
    """Relative error of what the update uses. An element that decodes to 0 counts as a tiny share of the largest."""
    used = exact.abs() > 0
    a, b = decoded[used].double(), exact[used].double()
    if name in _ROOTS:
        a, b = a.clamp_min(1e-3 * b.max().item() * 1e-12).rsqrt(), b.rsqrt()
    return ((a - b).norm() / b.norm()).item()


def what_zero_becomes() -> str:
    """What 0 is read back as, by the name of the code."""
    block = torch.zeros(4096)
    block[0] = 1.0
    results = {way: code(block)[1].item() for way, code in coders("exp_avg", (0.0, 1.0)).items()}
    return ", ".join(f"{way} {value:.2g}" for way, value in results.items())


def errors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, float, float]]:
    """For each state and code: the names of both, the mean relative error over large parameters, the share lost."""
    group = optimizer.param_groups[0]
    for name in _STATES:
        values = [s[name] for p, s in optimizer.state.items() if name in s and p.numel() >= 4096]
        if not values:
            continue
        for way, code in coders(name, (group["min_lr"], group["max_lr"])).items():
            decoded = [code(value) for value in values]
            relative = [relative_error(name, d, value) for d, value in zip(decoded, values)]
            lost = sum(((d == 0) & (value != 0)).sum().item() for d, value in zip(decoded, values))
            count = sum((value != 0).sum().item() for value in values)
            yield name, way, sum(relative) / len(relative), lost / max(count, 1)

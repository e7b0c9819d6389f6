"""Checkpoints of the four optimizers as they were written once, and the weights to which 20 steps led from them.

    python tests/golden_states.py            writes tests/golden/states.pt anew: only when the layout is meant to change
    python tests/golden_states.py --after    keeps what was saved: only when the arithmetic is meant to change

What is stored must load, and lead to the same bits, for as long as the layout has its number.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import library.automagic_cameamp as family

FILE = Path(__file__).resolve().parent / "golden" / "states.pt"

NAMES = tuple(name for name in family.__all__ if name.startswith("Automagic"))
WARMUP = 60
# Steps taken before saving: in the first half of the warm-up, which ends on the way, and after all of it.
STARTS = (20, 70)
STEPS = 20

_SHAPES = {"a.lora_down.weight": (4, 64), "a.lora_up.weight": (1024, 4), "a.bias": (32,), "b.weight": (3, 2, 3, 3)}


def machine() -> list[str]:
    """What decides the last bits of sums: they are compared where it is the same."""
    return [str(torch.__version__), platform.machine(), torch.backends.cpu.get_cpu_capability()]


def parameters() -> list[torch.nn.Parameter]:
    """A LoRA pair, of which the up is in bfloat16 and large enough for codes, a bias and a kernel."""
    made = []
    for number, shape in enumerate(_SHAPES.values()):
        values = 0.1 * _noise(torch.Size(shape).numel(), number, 0).view(shape)
        made.append(torch.nn.Parameter(values.bfloat16() if number == 1 else values))
    return made


def optimizer_of(name: str, params: list[torch.nn.Parameter]) -> Any:
    """One of the family, in two groups."""
    names = list(_SHAPES)
    groups = [
        {"params": params[:2], "param_names": names[:2]},
        {"params": params[2:], "param_names": names[2:], "lr": 3e-4, "weight_decay": 0.01},
    ]
    # By the rules, which give the same bits on every machine of a kind.
    options = {"momentum_scales": (1, 2, 5), "context_window": 20, "fused": False}
    return getattr(family, name)(groups, lr=1e-4, warmup_steps=WARMUP, **options)


def train(optimizer: Any, params: list[torch.nn.Parameter], first: int, steps: int) -> None:
    """Take some steps, the first of which has the number `first`, towards zero weights, through noise."""
    for step in range(first, first + steps):
        for number, p in enumerate(params):
            signal = p.detach().float() + 0.05 * _noise(p.numel(), number, step).view(p.shape)
            p.grad = None if number == 3 and step % 4 == 0 else (signal * 10.0 ** (number - 2)).to(p.dtype)
        family.report_loss(optimizer, 1.0 / step + (3.0 if step % 17 == 0 else 0.0))
        optimizer.step()
        for group in optimizer.param_groups:  # what a scheduler does
            group["lr"] = group.get("initial_lr", group["lr"])


def _noise(count: int, number: int, step: int) -> torch.Tensor:
    """Numbers between -1 and 1 that are the same with every version of torch."""
    x = torch.arange(count, dtype=torch.int64) + (number + 1) * 7919 + step * 104_729
    for factor in (2_654_435_761, 40_503):
        x = (x * factor) % 2**32
        x = x ^ (x >> 15)
    return (x % 20_001 - 10_000).to(torch.float32) / 10_000


def go_on(name: str, start: int, case: dict[str, Any]) -> list[torch.nn.Parameter]:
    """The weights to which a saved case leads."""
    params = parameters()
    for p, value in zip(params, case["weights"]):
        p.data.copy_(value)
    optimizer = optimizer_of(name, params)
    optimizer.load_state_dict(case["optimizer"])
    train(optimizer, params, start + 1, STEPS)
    return params


def main() -> None:
    torch.set_num_threads(1)
    cases = {}
    if "--after" in sys.argv[1:]:
        cases = torch.load(FILE, weights_only=True)["cases"]
        for key, case in cases.items():
            name, start = key.split()
            case["after"] = [p.detach() for p in go_on(name, int(start), case)]
        _write(cases)
        return
    for name in NAMES:
        for start in STARTS:
            params = parameters()
            optimizer = optimizer_of(name, params)
            train(optimizer, params, 1, start)
            # As it would be read from a file: training on must not change what was saved.
            saved = torch.load(_bytes({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in params]}))
            train(optimizer, params, start + 1, STEPS)
            cases[f"{name} {start}"] = {**saved, "after": [p.detach() for p in params]}
    _write(cases)


def _write(cases: dict[str, Any]) -> None:
    FILE.parent.mkdir(exist_ok=True)
    torch.save({"machine": machine(), "cases": cases}, FILE)
    print(f"written: {FILE}, {FILE.stat().st_size} bytes")


def _bytes(value: Any) -> Any:
    from io import BytesIO

    stream = BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


if __name__ == "__main__":
    main()

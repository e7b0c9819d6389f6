"""How fast are the steps on this machine's GPU, by kernels and by the rules, beside other optimizers and a plain copy?

    python -m benchmarks gpu
    python -m benchmarks gpu --output card.json

One go takes less than four minutes on a GPU that PyTorch can use by CUDA, and needs Triton. First the kernels are held
against the rules on the device itself. Then steps are timed by events of the device, and the bytes that a step has to
move at the least are set beside what a copy on the device moves in the same time. Peers that are not installed are left
out. The results are printed, and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import contenders
from .models import load, parameters
from .table import Table

# Model, and how many elements of it: as many as trained tensors of a full fine-tuning that fit beside peers.
MODELS: dict[str, int | None] = {"sd15_lora16": None, "sdxl_lora16": None, "sdxl_full": 100_000_000}

PEERS = (
    "torch AdamW fused",
    "bitsandbytes AdamW8bit",
    "adv_optm AdamW_adv",
    "prodigyopt Prodigy",
    "pytorch_optimizer CAME",
)

_PHASES = ("early", "after")
_COPIED = 256 * 2**20
_UNMEASURED = 3

# What is trained to compare: with codes in blocks of several sizes, and without. The last step is after the warm-up.
_SHAPES = [(64, 64), (16, 320), (40, 112), (9,), (6, 4, 3, 3)]
_STEPS = 9


@dataclass(frozen=True)
class Equality:
    """GpuKernels against rules, after some steps over all phases.

    Attributes:
        optimizer: the class.
        weights: the largest difference of a weight, in units of the largest step that it could take.
        codes: share of bytes of codes that are not the same.
    """

    optimizer: str
    weights: float
    codes: float


@dataclass(frozen=True)
class Timing:
    """One optimizer on one model.

    Attributes:
        model: the model.
        optimizer: the optimizer, and its phase.
        by: "kernels", "rules", or "" for a peer.
        milliseconds: median time of a step; with
        low, high: the quartiles.
        gigabytes_a_second: what a step has to move at the least, in that time; 0 for peers.
        share_of_copy: the same as a share of what a copy moves.
        peak: MiB that a step takes beyond what is there before it.
        launches: kernels of this project that a step launches.
    """

    model: str
    optimizer: str
    by: str
    milliseconds: float
    low: float
    high: float
    gigabytes_a_second: float
    share_of_copy: float
    peak: float
    launches: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the JSON file (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="measured steps of each optimizer (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that PyTorch can use by CUDA, and there is none")
    try:
        import triton
    except ImportError as error:
        raise SystemExit(f"Triton is missing: pip install triton, on Windows triton-windows ({error})") from None
    device = torch.device("cuda")
    about = {
        "card": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = measure(device, {name: load(name, limit) for name, limit in MODELS.items()}, args.rounds)
    args.output.write_text(json.dumps(about | results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")


def measure(device: torch.device, models: dict[str, list[tuple[int, ...]]], rounds: int) -> dict[str, Any]:
    """All figures, as the JSON file has them; printed as they come.

    Args:
        device: where to measure.
        models: the shapes of their tensors.
        rounds: measured steps of each optimizer.
    """
    table = Table("{:<46}{:>22.1e}{:>22.1e}", "equality with the rules", "weights", "codes apart")
    equalities = []
    for name in contenders.FAMILY:
        found = equality(name, device)
        table.row(found.optimizer, found.weights, found.codes)
        equalities.append(found)
    copied = copy_speed(device, rounds)
    print(f"a copy moves {copied / 1e9:.0f} GB/s")
    timings = []
    for model, shapes in models.items():
        count = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"{model}: {len(shapes)} tensors, {count / 1e6:.1f} M parameters")
        layout = "{:<46}{:<9}{:>9.3f}{:>9.3f}{:>9.3f}{:>8.0f}{:>8.0%}{:>9.1f}{:>9}"
        table = Table(layout, "optimizer", "by", "ms", "low", "high", "GB/s", "of copy", "MiB", "launches")
        for timing in timings_of(model, shapes, device, rounds, copied):
            table.row(*list(asdict(timing).values())[1:])
            timings.append(timing)
    return {
        "copy_gigabytes_a_second": copied / 1e9,
        "equality": [asdict(found) for found in equalities],
        "steps": [asdict(timing) for timing in timings],
    }


# Equality -------------------------------------------------------------------------------------------------------


def equality(name: str, device: torch.device) -> Equality:
    """The same training by kernels and by rules, both on the device."""
    from .compiled import launching

    kernels = _kernels()
    with launching(kernels):
        ours, ours_params = _trained(name, device, fused=True)
    rules, rules_params = _trained(name, device, fused=False)
    apart = total = 0
    weights = 0.0
    for p, q in zip(ours_params, rules_params):
        weights = max(weights, float((p - q).detach().abs().max()) / ours.config.max_lr)
        for key, value in rules.state[q].items():
            if isinstance(value, torch.Tensor) and value.dtype in (torch.uint8, torch.int8):
                apart += int((ours.state[p][key] != value).sum())
                total += value.numel()
    return Equality(name, weights, apart / total if total else 0.0)


def _trained(name: str, device: torch.device, fused: bool) -> tuple[Any, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(device)) for s in _SHAPES]
    optimizer = getattr(contenders.family, name)(params, lr=1e-3, warmup_steps=_STEPS - 1, fused=fused)
    for _ in range(_STEPS):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) + 0.1).to(device)
        optimizer.step()
    return optimizer, params


# Time and memory ------------------------------------------------------------------------------------------------


def copy_speed(device: torch.device, rounds: int) -> float:
    """Bytes that a copy on the device reads and writes in a second."""
    count = _COPIED if device.type == "cuda" else 2**16
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(_seconds(lambda: target.copy_(source), device) for _ in range(rounds + 2))
    return 2 * count / seconds


def timings_of(
    model: str, shapes: list[tuple[int, ...]], device: torch.device, rounds: int, copied: float
) -> Iterator[Timing]:
    """Every optimizer on one model, one after the other: together they would need too much memory."""
    from .compiled import launching
    from .kernels import floor

    params = [_on(p, device) for p in parameters(shapes)]
    count = sum(p.numel() for p in params)
    for name in PEERS:
        try:
            optimizer = contenders.peer(name)(params)
            seconds, peak = _steps(optimizer.step, device, rounds)
        except (ImportError, RuntimeError) as error:
            print(f"left out: {name} ({str(error).strip().partition(chr(10))[0]})")
            continue
        yield _timing(model, name, "", seconds, 0.0, copied, peak, 0)
        del optimizer
    for name in contenders.FAMILY:
        for phase in _PHASES:
            for fused in (True, False):
                kernels = _kernels()
                (build,) = contenders.in_phases(name, (phase,), fused=fused).values()
                with launching(kernels):
                    optimizer = build(params)
                    seconds, peak = _steps(optimizer.step, device, rounds)
                    before = kernels.launches
                    optimizer.step()
                launches, by = kernels.launches - before, "kernels" if fused else "rules"
                moved = floor(optimizer) * count
                yield _timing(model, f"{name}, {phase}", by, seconds, moved, copied, peak, launches)
                del optimizer


def _timing(
    model: str, name: str, by: str, seconds: list[float], moved: float, copied: float, peak: float, launches: int
) -> Timing:
    low, middle, high = (each * 1e3 for each in statistics.quantiles(seconds, n=4, method="inclusive"))
    speed = moved / (middle / 1e3)
    return Timing(model, name, by, middle, low, high, speed / 1e9, speed / copied, peak, launches)


def _steps(step: Callable[[], Any], device: torch.device, rounds: int) -> tuple[list[float], float]:
    """Seconds of each step after some unmeasured ones, and the MiB that a step takes beside what is there."""
    for _ in range(_UNMEASURED):
        step()
    seconds = [_seconds(step, device) for _ in range(rounds)]
    if device.type != "cuda":
        return seconds, 0.0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The time that some work takes on the device, from its first operation to its last."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _on(p: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """A parameter with its gradient on a device."""
    moved = torch.nn.Parameter(p.detach().to(device))
    assert p.grad is not None
    moved.grad = p.grad.to(device)
    return moved


def _kernels() -> Any:
    from library.cameamp.step.kernels.gpu.passes import GpuKernels

    return GpuKernels()

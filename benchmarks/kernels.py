"""What does the GPU code of a step ask of a GPU: launches, registers, and bytes a parameter beside the least possible?

    python -m benchmarks kernels
    python -m benchmarks kernels --chips 86 89
    python -m benchmarks kernels --processes 8    the same of shards, as the first of so many processes has them

Needs Triton and no GPU: kernels are compiled ahead for each chip, and nothing runs. Registers and spilled bytes are
the most of any kernel on any of the chips. Bytes are those of gradients, weights and states, counted in the compiled
code over all passes; the floor is every one of them read once and, if the step changes it, written once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.cameamp.phase import Phase

from . import contenders
from .models import load, parameters
from .table import Table

if TYPE_CHECKING:  # It needs Triton, which the options do not.
    from .compiled import Code, Launch

CHIPS = (75, 80, 86, 89, 90, 100, 120)

# Launches do not depend on the number of tensors, nor kernels on their sizes.
ELEMENTS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, help="compute capabilities (default: all)")
    parser.add_argument("--processes", type=int, default=1, help="how many share the parameters (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Compile and print."""
    require_triton()
    shapes = load("sdxl_lora16", ELEMENTS)
    shared = f", shared by {args.processes} processes" if args.processes > 1 else ""
    print(
        f"compute capabilities {', '.join(map(str, args.chips))}; a LoRA of SDXL{shared}, in the second step of a phase"
    )
    cut = partial(shards, mesh=mesh_of(args.processes)) if args.processes > 1 else list
    table = Table("{:<48}{:>9}{:>11}{:>9}{:>7.1f}{:>9.1f}{:>7.1f}", "optimizer and phase", "launches", "registers",
                  "spilled", "read", "written", "floor")  # fmt: skip
    known: dict[tuple[Launch, int], Code] = {}
    for name in contenders.FAMILY:
        for title, build in contenders.in_phases(name).items():
            optimizer = build(cut(parameters(shapes)))
            launches = recorded(optimizer, steps=2)
            codes = [code for launch, _ in launches for code in _compiled(launch, args.chips, known)]
            first = [known[launch, args.chips[0]] for launch, _ in launches]
            table.row(
                title, len(launches), max(code.registers for code in codes), max(code.spilled for code in codes),
                sum(code.read for code in first), sum(code.written for code in first), floor(optimizer),
            )  # fmt: skip


def require_triton() -> None:
    """End the program, saying what is missing, if there is no Triton."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"Triton is missing: pip install triton, on Windows triton-windows ({error})") from None


def mesh_of(processes: int) -> Any:
    """A mesh of so many processes, of which only the first is there; it adds up alone."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    return distributed.device_mesh.init_device_mesh("cpu", (processes,))


def shards(whole: Sequence[torch.nn.Parameter], mesh: Any) -> list[torch.nn.Parameter]:
    """What the first process of a mesh has of parameters and their gradients, as FSDP2 cuts them."""
    from torch.distributed.tensor import DTensor, Shard

    def cut(x: torch.Tensor) -> torch.Tensor:
        part = x.chunk(mesh.size())[0].contiguous()
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=x.shape, stride=x.stride())

    found = []
    for p in whole:
        assert p.grad is not None
        found.append(torch.nn.Parameter(cut(p.detach())))
        found[-1].grad = cut(p.grad)
    return found


def recorded(optimizer: Any, steps: int = 1) -> list[tuple[Launch, int]]:
    """What the last of some steps of an optimizer launches, with the number of programs."""
    from .compiled import Recorder, launching

    recorder = Recorder()
    optimizer._engine.forget()  # It may have taken steps by other kernels before.
    for _ in range(steps):
        recorder.recorded.clear()
        with launching(recorder):
            optimizer.step()
    return recorder.recorded


def floor(optimizer: Any) -> float:
    """Bytes a parameter of gradients, weights and the states in use, read once, and written once if they change."""
    (group,) = optimizer.param_groups
    moved = count = 0
    for p in group["params"]:
        state = optimizer.state[p]
        count += p.numel()
        moved += 3 * p.numel() * p.element_size()
        phase = Phase.at(state["step"], optimizer.config.warmup_steps)
        due = {f"momentum_scale_{period}" for period in optimizer.config.momentum_scales if state["step"] % period == 0}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                name = key.removesuffix("_scale").removesuffix("_q")
                changes = name in due if name.startswith("momentum_scale") else phase.warmup or name != "lr_mask"
                if phase.early or name != "s":
                    moved += (1 + changes) * value.numel() * value.element_size()
    return moved / count


def _compiled(launch: Launch, chips: Sequence[int], known: dict[tuple[Launch, int], Code]) -> Iterator[Code]:
    from .compiled import compiled

    for chip in chips:
        if (launch, chip) not in known:
            known[launch, chip] = compiled(launch, chip)
        yield known[launch, chip]

"""What do the states of a large model take on each of many processes, and what do those tell one another in a step?

Computed, and not measured: from the shapes of two models, and from how FSDP2 shards them, what the process with most of
the states holds, and how long the messages of a step are. The steps are those of a full fine-tuning in float32. Of a
message every process sends and receives about twice its length. For comparison: what a process reads and writes to take
its step by kernels, pass after pass, and the gradients that FSDP2 itself sends over the network for it.

And by how much the states of models that fit one card are more than a process's share of what one process has.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

import library.automagic_cameamp as family
from library.cameamp.config import OptimizerConfig
from library.cameamp.context.sampling import Sampler
from library.cameamp.phase import Phase
from library.cameamp.states import TABLE, State, momentum
from library.cameamp.storage import matrix_shape
from library.cameamp.storage.shards import Place, ShardAverageFormat
from library.cameamp.techniques.multiscale import is_due

from .contenders import FAMILY
from .models import load
from .table import Table

PROCESSES = (8, 64, 512)
FEW = (2, 8)
_EARLY, _AFTER = Phase(early=True, warmup=True), Phase(early=False, warmup=False)

# Of the contextual optimizers with the momentum that is updated at every step, and with all, which is rare.
_STEPS = (
    ("plain", "Automagic_CameAMP", 1),
    ("contextual, 1 momentum", "Automagic_CameAMP_COptim", 1),
    ("contextual, all momenta", "Automagic_CameAMP_COptim", 50),
)

Shapes = list[tuple[int, ...]]


def flux() -> Shapes:
    """FLUX.1 dev: 19 double and 38 single blocks of width 3072; 12 billion parameters."""
    d, mlp = 3072, 12288
    shapes = _linear(d, 64) + _linear(d, 4096)
    for first in (256, 768, 256):  # The step, the pooled text, the guidance.
        shapes += _linear(d, first) + _linear(d, d)
    stream = (
        _linear(6 * d, d) + _linear(3 * d, d) + [(128,), (128,)] + _linear(d, d) + _linear(mlp, d) + _linear(d, mlp)
    )
    shapes += 19 * 2 * stream
    shapes += 38 * (_linear(3 * d + mlp, d) + _linear(d, d + mlp) + [(128,), (128,)] + _linear(3 * d, d))
    return shapes + _linear(64, d) + _linear(2 * d, d)


def wan() -> Shapes:
    """Wan 2.1 14B, a video model: 40 blocks of width 5120; 14 billion parameters."""
    d, ffn = 5120, 13824
    shapes = [(d, 16, 1, 2, 2), (d,)]
    shapes += _linear(d, 4096) + _linear(d, d) + _linear(d, 256) + _linear(d, d) + _linear(6 * d, d)
    attention = 4 * _linear(d, d) + [(d,), (d,)]
    shapes += 40 * (2 * attention + [(d,), (d,)] + _linear(ffn, d) + _linear(d, ffn) + [(1, 6, d)])
    return shapes + _linear(64, d) + [(1, 2, d)]


MODELS = {"Flux, 12 B": flux, "Wan 2.1, 14 B": wan}

SMALLER: dict[str, Callable[[], Shapes]] = {
    "SDXL": partial(load, "sdxl_full"),
    "LoRA, rank 16": partial(load, "sdxl_lora16"),
    "LoRA, rank 4": lambda: [tuple(4 if size == 16 else size for size in shape) for shape in load("sdxl_lora16")],
}


def state_bytes(shapes: Shapes, processes: int, name: str, phase: Phase) -> int:
    """What the states take on the process that holds most of them; of one process, they are not sharded."""
    optimizer_class = getattr(family, name)
    config, rows = OptimizerConfig(), _rows(name, phase)
    total = 0
    for shape in map(torch.Size, shapes):
        place = Place(0, -(-shape[0] // processes)) if processes > 1 else None
        part = shape if place is None else torch.Size((place.most_rows, *shape[1:]))
        total += sum(optimizer_class._precision.format(row, shape, config, place).bytes(part) for row in rows)
    return total


def over_share(shapes: Shapes, processes: int, name: str, phase: Phase) -> float:
    """By how much the process that holds most of the states has more than its share of those of one process."""
    return state_bytes(shapes, processes, name, phase) * processes / state_bytes(shapes, 1, name, phase) - 1


def _rows(name: str, phase: Phase) -> list[State]:
    """The states that an optimizer has in a phase."""
    config = OptimizerConfig()
    rows = [row for row in TABLE if row.lives(phase, config.came)]
    return rows + [momentum(period) for period in config.momentum_scales if contextual(name)]


def message_bytes(shapes: Shapes, stacks: int, early: bool, name: str, step: int = 1) -> list[int]:
    """The lengths of the messages of a step.

    Args:
        shapes: of the tensors, of one group.
        stacks: how many stacks they are in.
        early: whether the step is of the early phase; else it is of one after the warm-up.
        name: the optimizer.
        step: of the contextual ones, which decides which momenta are updated.
    """
    tensors = len(shapes)
    # The sums of magnitudes and, where weights decay, of their squares; how many are not 0.
    numbers = tensors * (2 if early else 1) + stacks
    if contextual(name):
        # Of each process the loss, and what it adds to three samples: two of the step before.
        numbers += 3 + 3 * Sampler([torch.Size(shape).numel() for shape in shapes]).size
    lengths = [8 * numbers, 8 * (tensors + _numbers_of_momenta(shapes, name, step))]
    if early:
        columns = sum(matrix_shape(torch.Size(shape))[1] for shape in shapes)
        lengths += [4 * 2 * columns, 8 * 3 * tensors]
    return lengths


def _numbers_of_momenta(shapes: Shapes, name: str, step: int) -> int:
    """How many numbers the processes add up to update the momenta that are due at a step."""
    config, precision = OptimizerConfig(), getattr(family, name)._precision
    due = [momentum(period) for period in config.momentum_scales if contextual(name) and is_due(period, step)]
    count = 0
    for shape in map(torch.Size, shapes):
        for row in due:
            code = precision.format(row, shape, config, Place(0, shape[0]))
            if isinstance(code, ShardAverageFormat):
                count += sum(map(math.prod, code.summand_shapes(shape)))
    return count


def contextual(name: str) -> bool:
    """Whether an optimizer of the family is contextual."""
    return "COptim" in name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, help="how many (default: 8 64 512)")


def run(args: argparse.Namespace) -> None:
    """Compute and print."""
    for title, shapes_of in MODELS.items():
        shapes = shapes_of()
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"{title}: {len(shapes)} tensors, {elements / 1e9:.2f} billion parameters\n")
        states = Table(
            "{:<30}{:>10}{:>15.3f}{:>13.2%}{:>15.3f}",
            "states", "processes", "warm-up, GB", "over share", "after, GB",
        )  # fmt: skip
        for name in FAMILY:
            for processes in args.processes:
                warmup, after = (state_bytes(shapes, processes, name, phase) for phase in (_EARLY, _AFTER))
                states.row(name, processes, warmup / 1e9, over_share(shapes, processes, name, _EARLY), after / 1e9)
        print()
        table = Table("{:<46}{:>10}{:>12.2f}{:>28}", "messages of a step", "messages", "MB in all", "MB each")
        for kind, name, step in _STEPS:
            for early in (True, False):
                lengths = message_bytes(shapes, _stacks(shapes), early, name, step)
                title = kind + (", early" if early else ", after the warm-up")
                table.row(title, len(lengths), sum(lengths) / 1e6, " ".join(f"{n / 1e6:.2f}" for n in lengths))
        print()
        work = Table(
            "{:>10}{:>30.2f}{:>12.2f}{:>28.2f}",
            "processes", "read and written, early, GB", "later, GB", "gradients of FSDP2, GB",
        )  # fmt: skip
        for processes in args.processes:
            part = elements / processes
            # Weights, gradients and states once each way, and before that what each pass that sums reads of them.
            early, later = part * 4 * (7 + 6 + (1 + 2 + 3 + 6)), part * 4 * (6 + 4 + (1 + 2))
            work.row(processes, early / 1e9, later / 1e9, 4 * elements * (processes - 1) / processes / 1e9)
        print()
    for title, phase in (("in the warm-up", _EARLY), ("after it", _AFTER)):
        over = Table("{:<30}{:>10}" + "{:>16.2%}" * len(SMALLER), f"over share, {title}", "processes", *SMALLER)
        for name in FAMILY:
            for processes in FEW:
                over.row(name, processes, *(over_share(of(), processes, name, phase) for of in SMALLER.values()))
        print()


def _linear(out: int, into: int) -> Shapes:
    return [(out, into), (out,)]


def _stacks(shapes: Sequence[tuple[int, ...]]) -> int:
    """At least one for each shape; more do not matter, they add a number each."""
    return len(set(shapes))

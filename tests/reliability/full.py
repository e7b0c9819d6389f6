"""The full counts of the long checks: python tests/reliability/full.py [part ...]

Each part runs in its own process, one after the other; all of them take about half an hour on one core. The figures are
printed and written to output/reliability.txt. A part that fails prints its error, and the exit status is then 1. The
tests run the same functions with small counts.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# These replace this folder in the path: its modules are imported as reliability.*.
sys.path[0:1] = [str(_ROOT), str(_ROOT / "tests")]

FUZZ_CASES = 4_000
KILLS = 200
FULL_DISKS = 50
PAIR_STEPS = 100
DDP_STEPS = 200
SHARD_STEPS = 200
EXTREME_STEPS = 10_000
ARRANGED_STEPS = 100
LONG_STEPS = 20_000


def fuzz() -> list[str]:
    """Checkpoints under attack."""
    from reliability.fuzz import fuzz

    outcomes = fuzz(FUZZ_CASES)
    kinds = sorted({outcome.partition(": ")[0] for outcome in outcomes})
    lines = [f"{sum(outcomes.values())} cases, none let in wrong or changed by a refusal"]
    for kind in kinds:
        counts = [(o.partition(": ")[2], n) for o, n in sorted(outcomes.items()) if o.partition(": ")[0] == kind]
        lines.append(f"  {kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts))
    return lines


def kills() -> list[str]:
    """SIGKILL while saving."""
    from reliability.interrupted import killed

    with tempfile.TemporaryDirectory() as folder:
        outcomes = killed(Path(folder), KILLS)
    return [f"{KILLS} kills: " + ", ".join(f"{what} {count} times" for what, count in sorted(outcomes.items()))]


def killed_ranks() -> list[str]:
    """A process of a sharded run is killed while saving."""
    from reliability.killed import PLACES, kill, left
    from reliability.processes import in_processes
    from reliability.resharded import same

    for place in PLACES:
        with tempfile.TemporaryDirectory() as folder:
            saved = kill(Path(folder), place)
            (found,) = in_processes(1, left, folder)
            assert found.keys() == saved.keys(), place
            assert all(same(value, found[key]) for key, value in saved.items()), place
    return [f"{len(PLACES)} deaths of one of two processes: the state before is whole, and one process resumes from it"]


def full_disk() -> list[str]:
    """A disk that is full while saving."""
    from reliability.interrupted import full_disk

    with tempfile.TemporaryDirectory() as folder:
        messages = full_disk(Path(folder), FULL_DISKS)
    return [f"{len(messages)} disks full at a different byte: one line each, the state before still loads"]


def pairs() -> list[str]:
    """Every optimizer's checkpoint in every optimizer."""
    from reliability.runs import PAIRS, PHASES, Run

    worst, converted = -1.0, 0
    for first, second in PAIRS:
        for steps in PHASES.values():
            before = Run(first).run(steps)
            after = before.resumed(second)
            start = before.loss()
            losses = [after.run(1).loss() for _ in range(PAIR_STEPS)]
            worst = max(worst, max(losses[:10]) / start - 1)
            assert max(losses) <= 1.02 * start, (first, second, steps)
            assert losses[-1] < start, (first, second, steps)
            converted += 1
    return [
        f"{converted} conversions ({len(PAIRS)} pairs in {len(PHASES)} phases): over the next {PAIR_STEPS} steps no "
        f"loss was more than 2 % above the one saved; largest rise in the first 10: {100 * worst:+.2f} %"
    ]


def ddp() -> list[str]:
    """Two processes over gloo."""
    from reliability.distributed import ddp, flattened

    for name, digests in ddp(DDP_STEPS).items():
        assert len(set(digests)) == 1, name
    kinds = [kind for messages in flattened() for kind in messages.items()]
    assert all("is of FSDP1" in message for _, messages in kinds for message in messages.values())
    return [
        f"{DDP_STEPS} steps of DDP, gradients of 2 batches accumulated, resumed in the middle: bit-identical replicas",
        *(f"{kind}: a clear RuntimeError at the first step, nothing changed" for kind in sorted(dict(kinds))),
    ]


def shards() -> list[str]:
    """Parameters sharded by FSDP2 over two, three, and two times two processes."""
    from reliability.processes import in_processes
    from reliability.sharded import alone, loss_of, steps_of

    names = "Automagic_CameAMP", "Automagic_CameAMP_COptim"
    # The multiplier would raise what rounding does to the samples it follows to a power; so it is held nearly still.
    options = {"warmup_steps": SHARD_STEPS * 3 // 5, "adaptation_rate": 1e-3}
    lines = []
    for shape, mixed in (((2,), False), ((3,), False), ((2, 2), False), ((2,), True)):
        found = in_processes(math.prod(shape), partial(steps_of, mixed=mixed, **options), shape, names, SHARD_STEPS)
        for name in names:
            first, *others = (process[name] for process in found)
            assert all(other["multiplier"] == first["multiplier"] for other in others), name
            expected, _ = alone(name, SHARD_STEPS, **options)
            ours, one = loss_of(first["weights"]), loss_of(expected)
            furthest = max((weight - expected[p]).abs().max().item() for p, weight in first["weights"].items())
            assert mixed or furthest < 1e-6, (name, shape, furthest)
            assert abs(ours / one - 1) < (0.1 if mixed else 1e-5), (name, shape, ours, one)
            kind = ", bfloat16 mixed precision" if mixed else ""
            lines.append(
                f"{name}, {' x '.join(map(str, shape))} processes{kind}: after {SHARD_STEPS} steps weights within "
                f"{furthest:.1e} of one process, loss {ours:.4f} against {one:.4f}, one multiplier"
            )
    return lines


def coded_momenta() -> list[str]:
    """Matrices that are large enough for their momenta to be coded, sharded, against one process that has them whole.

    And that process by the rules, against itself by kernels: so far apart are two ways to compute the same.
    """
    from reliability.processes import in_processes
    from reliability.resharded import distance, model_of, trained

    start = model_of().state_dict()
    lines = []
    for name, options in (
        ("Automagic_CameAMP", {}),
        ("Automagic_CameAMP8bit", {}),
        ("Automagic_CameAMP_COptim", {"adaptation_rate": 1e-3}),
        ("Automagic_CameAMP_COptim8bit", {"adaptation_rate": 1e-3}),
        ("Automagic_CameAMP_COptim", {}),
    ):
        (one,) = in_processes(1, partial(trained, **options), name, SHARD_STEPS, False)
        way = distance(one["weights"], start)
        for where, count in (("by the rules", 0), *((f"over {count}", count) for count in (1, 2, 3))):
            by = partial(trained, **options) if count else partial(trained, fused=False, **options)
            found = in_processes(count or 1, by, name, SHARD_STEPS, count > 0)[0]
            away = distance(found["weights"], one["weights"]) / way
            lines.append(
                f"{name}, {options or 'defaults'}, {where}: after {SHARD_STEPS} steps {away:.2g} of the way from "
                f"one process, loss {found['loss']:.5f} against {one['loss']:.5f}, multiplier "
                f"{found['multiplier']:.3g} against {one['multiplier']:.3g}"
            )
    return lines


def numbers() -> list[str]:
    """Gradients and options at their extremes."""
    from reliability.extremes import ARRANGEMENTS, extreme_steps
    from reliability.runs import OPTIMIZERS

    lines = []
    for optimizer_class in OPTIMIZERS:
        unusable = extreme_steps(optimizer_class, EXTREME_STEPS)
        for seed in range(1, ARRANGEMENTS):
            unusable += extreme_steps(optimizer_class, ARRANGED_STEPS, seed)
        lines.append(
            f"{optimizer_class.__name__}: {EXTREME_STEPS} steps, then {ARRANGED_STEPS} with each of "
            f"{ARRANGEMENTS - 1} other arrangements of shapes and dtypes: {unusable} gradient elements counted as 0, "
            "every weight and state finite"
        )
    return lines


def long_run() -> list[str]:
    """A small model over many steps."""
    from reliability.extremes import long_run
    from reliability.runs import OPTIMIZERS

    lines = []
    for optimizer_class in OPTIMIZERS:
        looks = long_run(optimizer_class, LONG_STEPS)
        (step, resident, tensors, loss), (last, last_resident, last_tensors, last_loss) = looks[0], looks[-1]
        assert last_tensors <= tensors, (
            f"{optimizer_class.__name__}: tensors grew from {tensors} to {last_tensors} bytes"
        )
        lines.append(
            f"{optimizer_class.__name__}: step {step} to {last}: tensors {tensors / 2**10:.1f} to "
            f"{last_tensors / 2**10:.1f} KiB, process {resident:.1f} to {last_resident:.1f} MiB, "
            f"loss {loss:.3g} to {last_loss:.3g}, every weight and state finite"
        )
    return lines


PARTS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part
    for part in (fuzz, kills, killed_ranks, full_disk, pairs, ddp, shards, coded_momenta, long_run, numbers)
}


def _run(name: str) -> list[str]:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    return PARTS[name]()


def main() -> int:
    """Run the parts that were named, or all; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them by default")
    parts = parser.parse_args().parts
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part '{unknown[0]}'; allowed: {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "bitsandbytes"))
    report = _ROOT / "output" / "reliability.txt"
    report.parent.mkdir(exist_ok=True)
    report.write_text("", encoding="utf-8")
    _report(report, f"Python {platform.python_version()}, {packages}")
    failed = 0
    for name in parts or PARTS:
        start = time.perf_counter()
        # spawn: the process has no threads, so that `kills` can fork it, and no memory of another part.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            try:
                lines = process.submit(_run, name).result()
            except Exception as error:
                failed, lines = 1, [f"FAILED: {type(error).__name__}: {error}"]
        _report(report, f"{name} ({time.perf_counter() - start:.0f} s)", *(f"  {line}" for line in lines))
    return failed


def _report(report: Path, *lines: str) -> None:
    print(*lines, sep="\n", flush=True)
    with report.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

"""The convergence study: its runs repeat themselves, its tables come from finished results, and its patches go away."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.__main__ import main
from benchmarks.contenders import REFERENCE
from benchmarks.study import runs, tables
from benchmarks.study.finished import Finished
from benchmarks.study.optimizers import CONTEXTUAL, PLAIN, beyond
from benchmarks.study.runs import DIGITS, TEXT, Result, Run, Runs
from benchmarks.study.variants import VARIANTS
from library.automagic_cameamp import Automagic_CameAMP_COptim
from library.cameamp.context.controller import STANDARD_LAW
from library.cameamp.states import THIRTY_TWO_BITS
from library.cameamp.step.rules import ALL_TECHNIQUES

RESULTS = Path(tables.__file__).parents[1] / "results" / "convergence.json"


def make(folder: Path, *wanted: Run, steps: int = 3) -> list[list[float]]:
    """The losses of runs of a few steps, made anew."""
    few = Runs(Finished(folder / "results.json"), {DIGITS: 2, TEXT: steps})
    return [few.make(run).losses for run in wanted]


@pytest.mark.parametrize(("task", "steps"), [(DIGITS, 2), (TEXT, 3)])
def test_a_run_repeats_itself_and_depends_on_seed_and_optimizer(task: str, steps: int, tmp_path: Path) -> None:
    wanted = [Run(task, PLAIN, 1e-3), Run(task, PLAIN, 1e-3, seed=1), Run(task, REFERENCE, 1e-3)]
    first, other_seed, other_optimizer = make(tmp_path / "one", *wanted)
    assert [first] == make(tmp_path / "two", wanted[0])
    assert len(first) == steps
    assert len({tuple(first), tuple(other_seed), tuple(other_optimizer)}) == 3
    assert all(math.isfinite(loss) and loss > 0 for loss in first)


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    run = Run(TEXT, PLAIN, 1e-3)
    losses = make(tmp_path, run)
    with mock.patch.object(runs, "train", side_effect=AssertionError("trained again")):
        assert make(tmp_path, run) == losses


def test_tables_and_pictures_come_from_finished_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with mock.patch.object(runs, "train", side_effect=AssertionError("trained")):
        main(["convergence", "--print", str(RESULTS), "--pictures", str(tmp_path)])
    printed = capsys.readouterr().out
    for task in (DIGITS, TEXT):
        assert f"{task}: goals" in printed
        assert f"{task}, {runs.STEPS[task]} steps, seed 0" in printed
    assert printed.count(f"    {PLAIN} ") >= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "study-curves.png",
        "study-range.png",
        "study-steps.png",
    ]


def test_tables_show_the_losses_of_the_results(tmp_path: Path) -> None:
    finished = Finished(tmp_path / "results.json")
    few = Runs(finished, {DIGITS: 20, TEXT: 20})
    for optimizer, losses in ((REFERENCE, [0.4, 0.2]), (PLAIN, [0.3, 0.1])):
        result = {"every": 10, "steps": 20, "losses": losses}
        finished.get(few.name(Run(DIGITS, optimizer, 1e-3)), lambda result=result: result)
    line = next(line for line in tables.all_tables(few) if line.startswith(f"    {PLAIN} "))
    assert "0.10000" in line
    printed = list(tables.all_tables(few))
    reach = printed[next(i for i, line in enumerate(printed) if "the best of ours at its best" in line) + 1]
    assert reach.endswith("missed (0.75)")
    assert not any("options" in line or "left out" in line for line in printed)  # Nothing is known of either.


@pytest.mark.parametrize(
    ("loss", "steps"), [(0.4, 10), (0.9, 10), (0.3, 15), (0.2, 20), (0.1, math.inf)], ids=lambda value: f"{value:g}"
)
def test_steps_to_a_loss(loss: float, steps: float) -> None:
    assert Result([10, 20], [0.4, 0.2]).steps_to(loss) == pytest.approx(steps)


def test_a_grid_is_extended_at_its_edges_only() -> None:
    tried = (1e-3, 2e-3, 4e-3)
    assert beyond(REFERENCE, tried, 4e-3) == pytest.approx(8e-3)
    assert beyond(REFERENCE, tried, 1e-3) == pytest.approx(5e-4)
    assert beyond(REFERENCE, tried, 2e-3) is None
    assert beyond(PLAIN, tried, 4e-3) is None


@pytest.mark.parametrize("name", [name for name in VARIANTS if name])
def test_a_variant_differs_from_the_product_and_leaves_it_alone(name: str) -> None:
    variant = VARIANTS[name]
    changed = variant.of(Automagic_CameAMP_COptim)
    own = [changed._techniques, changed._precision, changed._driver_class.law]
    product = [ALL_TECHNIQUES, THIRTY_TWO_BITS, STANDARD_LAW]
    assert own != product or variant.options or variant.warmup != 0.5
    product_class = Automagic_CameAMP_COptim
    assert [product_class._techniques, product_class._precision, product_class._driver_class.law] == product


def test_a_technique_left_out_changes_the_course(tmp_path: Path) -> None:
    names = [
        "",
        "without Grams",
        "without AdaBelief",
        "bias correction of the residual",
        "without multi-scale momentum",
    ]
    courses = make(tmp_path, *(Run(TEXT, CONTEXTUAL, 1e-3, 0, name) for name in names), steps=10)
    assert len({tuple(course) for course in courses}) == len(names)

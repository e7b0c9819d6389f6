"""The study of fine-tunes: runs repeat themselves and are kept, grids grow at their edges, tables compare pairs."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import stacking
from benchmarks.__main__ import main
from benchmarks.contenders import REFERENCE
from benchmarks.study import protocol
from benchmarks.study.digits import DigitsLoRA
from benchmarks.study.finished import Finished
from benchmarks.study.optimizers import CONTEXTUAL
from benchmarks.study.protocol import Case, Study
from benchmarks.study.schedules import constant, cosine
from benchmarks.study.task import train
from benchmarks.study.variants import VARIANTS
from library.automagic_cameamp import Automagic_CameAMP_COptim
from library.cameamp.context.controller import STANDARD_LAW
from library.cameamp.states import THIRTY_TWO_BITS
from library.cameamp.step.rules import ALL_TECHNIQUES

TEXT = "text from random weights"


def study(folder: Path) -> Study:
    return Study(Finished(folder / "results.json"))


def test_a_case_is_trained_once_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case = Case(TEXT, 4, "cosine")
    first = study(tmp_path)
    for seed in (0, 1):
        first.train(case, ["contextual", "contextual, loss tenfold for 20 steps"], seed)
    trained = capsys.readouterr().out
    assert "contextual, lr None, seed 1" in trained
    again = study(tmp_path)
    with mock.patch.object(protocol, "train", side_effect=AssertionError("trained again")):
        again.train(case, ["contextual"], 1)
        lines = list(again.table(case))
    assert lines[0].startswith("text from random weights, 4 steps, cosine; AdamW on the first seed")
    (row,) = [line for line in lines if line.strip().startswith("contextual  ")]
    assert "    2  " in row
    assert list(again.table(Case(TEXT, 4, "constant"))) == []


def test_a_grid_grows_until_its_best_rate_has_neighbours(tmp_path: Path) -> None:
    tried = []

    def trained(contender, case, lr, seed):
        tried.append(lr)
        return {"losses": [abs(math.log2(lr / 1.6e-2))]}

    with mock.patch.object(protocol, "_trained", side_effect=trained):
        study(tmp_path).train(Case(TEXT, 4, "constant"), [], 0)
    assert sorted(tried) == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])


def test_rows_compare_the_same_seeds(tmp_path: Path) -> None:
    case, made = Case(TEXT, 4, "constant"), study(tmp_path)

    def trained(contender, case, lr, seed):
        if contender.optimizer == REFERENCE:
            return {"losses": [5.0, 2.0 + seed + 100 * abs(lr - 2e-3)]}
        return {"losses": [1.9 + seed, 1.0 + seed]}

    with mock.patch.object(protocol, "_trained", side_effect=trained):
        for seed in (0, 1):
            made.train(case, ["contextual"], seed)
    (row,) = [line for line in made.table(case) if line.strip().startswith("contextual  ")]
    assert f"{(1 / 2 + 2 / 3) / 2 - 1:+.2%}" in row
    assert row.endswith("0.50")


@pytest.mark.parametrize("task", list(protocol.TASKS))
def test_every_task_can_be_trained(task: str) -> None:
    if task.startswith("encoder"):
        for package in ("all_minilm_l6_v2", "peft", "transformers"):
            pytest.importorskip(package)
    made = protocol.TASKS[task](0)
    before = [p.detach().clone() for _, p in made.named_parameters()]
    losses = train(made, lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-3), 2, 1, constant)
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(not torch.equal(p, old) for (_, p), old in zip(made.named_parameters(), before)) > len(before) / 3


def test_the_schedule_reaches_the_optimizer() -> None:
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    train(protocol.TASKS[TEXT](0), lambda named: Watched([p for _, p in named], lr=0.1), 20, 20, cosine)
    assert rates == pytest.approx([0.1 * cosine(step, 20) for step in range(20)])
    assert max(rates) == 0.1
    assert rates[-1] < 1e-3


def test_an_interval_has_the_mean_inside_and_shrinks_with_the_spread() -> None:
    wide, narrow = protocol.interval([-0.04, 0.0, 0.04]), protocol.interval([-0.01, 0.0, 0.01])
    assert narrow.mean == pytest.approx(0.0, abs=1e-9)
    assert wide.low < narrow.low < 0.0 < narrow.high < wide.high


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_the_product_and_leaves_it_alone(name: str) -> None:
    variant, product_class = VARIANTS[name], Automagic_CameAMP_COptim
    changed = variant.of(product_class)
    product = [ALL_TECHNIQUES, THIRTY_TWO_BITS, STANDARD_LAW]
    assert [changed._techniques, changed._precision, changed._driver_class.law] != product or variant.options
    assert [product_class._techniques, product_class._precision, product_class._driver_class.law] == product


def test_what_is_left_out_changes_the_course() -> None:
    names = ["without Grams", "without AdaBelief", "without multi-scale momentum", "without the multiplier"]
    courses = [
        protocol._trained(protocol.CONTENDERS[name], Case(TEXT, 10, "constant"), None, 0)["losses"]
        for name in ("contextual", *(f"contextual, {name}" for name in names))
    ]
    assert len({tuple(course) for course in courses}) == len(courses)


def test_two_loras_act_together() -> None:
    first, second, both = (DigitsLoRA(seed, rank=4, batch_size=2, images=4) for seed in range(3))
    before = both.held_out_loss()
    for number, task in enumerate((first, second)):
        with torch.no_grad():
            for name, p in task.named_parameters():
                if "lora_up" in name:
                    p.fill_(0.01 * (number + 1))
    both.add(first.lora)
    both.add(second.lora)
    together = both.held_out_loss()
    both.lora.load_state_dict({name: torch.zeros_like(p) for name, p in both.lora.state_dict().items()})
    assert both.held_out_loss() == together != before
    assert together not in (first.held_out_loss(), second.held_out_loss())


def test_stacking_prints_what_it_finds(capsys: pytest.CaptureFixture) -> None:
    with mock.patch.object(stacking, "_CONTENDERS", ((CONTEXTUAL, 1e-6), (REFERENCE, 1e-3))):
        main(["stacking", "--steps", "2", "--seeds", "1"])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split("  ")[0] for row in rows] == [CONTEXTUAL, REFERENCE]
    for row in rows:
        alone, together, share = row.split()[-3:]
        assert 0 < float(alone) < 1
        assert 0 < float(together) < 1
        assert 0 < float(share.rstrip("%")) <= 100

"""The plugin, against a stand-in for sd-scripts: resuming, at another learning rate too, and schedules that end."""

from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_host import host_args, run

from library import automagic_cameamp
from library.cameamp.command_line import OWN_OPTIMIZERS
from library.cameamp.new_rate import rescale
from library.cameamp.sd_scripts.schedule import PlannedEnd
from library.cameamp.sd_scripts.settings import warn_of_miscounted_steps

OPTIMIZERS = [getattr(automagic_cameamp, name) for name in OWN_OPTIMIZERS]

# Several optimizers --------------------------------------------------------------------------------------------------


def several(folder, *more, steps=2):
    return run(
        "--train_script", "fine_tune.py", "--optimizer_type", "Automagic_CameAMP_COptim", "--learning_rate", "1e-6",
        "--optimizer_args", "warmup_steps=30", "--max_train_steps", str(steps), "--output_dir", str(folder), *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The state of two steps of two optimizers, at a rate that grows by 1e-6 a step."""
    folder = tmp_path_factory.mktemp("saved") / "state"
    done = several(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_optimizer_and_schedule_goes_on(saved, tmp_path):
    done = several(tmp_path / "again", "--resume", str(saved))
    assert done.returncode == 0, done.stderr
    for file in ("optimizer.bin", "optimizer_1.bin"):
        again = torch.load(tmp_path / "again" / file, weights_only=True)
        assert {state["step"] for state in again["state"].values()} == {4}, file
        assert again["param_groups"][0]["lr"] == pytest.approx(5e-6), file
    for file in ("scheduler.bin", "scheduler_1.bin"):
        assert torch.load(tmp_path / "again" / file, weights_only=True)["last_epoch"] == 4


def copied(source, target):
    return lambda folder: shutil.copy(folder / source, folder / target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "optimizer_1.bin").unlink(), ": has no optimizer_1.bin; the state is of another"),
        (copied("optimizer.bin", "optimizer_2.bin"), ": has also optimizer_2.bin; the state is of another number"),
        (copied("optimizer.bin", "optimizer_1.bin"), "/optimizer_1.bin: parameter 0"),
        (lambda folder: (folder / "optimizer_1.bin").write_bytes(b"nothing"), "/optimizer_1.bin: "),
        (copied("optimizer_1.bin", "optimizer.bin"), ": parameter 0"),
        (lambda folder: (folder / "optimizer.bin").unlink(), ": has no optimizer.bin, so"),
        (lambda folder: (folder / "scheduler_1.bin").unlink(), "/scheduler_1.bin: "),
        (shutil.rmtree, ": is not a folder"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_told_before_training(saved, tmp_path, change, message):
    folder = tmp_path / "state"
    shutil.copytree(saved, folder)
    change(folder)
    done = several(tmp_path / "again", "--resume", str(folder))
    assert done.returncode == 2, done.stderr
    assert f"error: --resume {folder}{message}" in done.stderr.replace("\\", "/")
    assert "Traceback" not in done.stderr
    assert "training begins" not in done.stdout


# Another learning rate -----------------------------------------------------------------------------------------------


def test_a_new_rate_at_a_resume_does_not_count_and_one_warning_says_so(saved, tmp_path):
    done = several(tmp_path / "again", "--resume", str(saved), "--learning_rate", "3e-6")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "learning rate, 1e-06, and not at 3e-06" in line]
    assert len(warnings) == 1
    assert "--new_learning_rate_on_resume" in warnings[0]
    for file in ("optimizer.bin", "optimizer_1.bin"):
        assert torch.load(tmp_path / "again" / file, weights_only=True)["param_groups"][0]["initial_lr"] == 1e-6


def test_the_option_makes_it_count_in_every_optimizer_and_schedule(saved, tmp_path):
    done = several(
        tmp_path / "again", "--resume", str(saved), "--learning_rate", "3e-6", "--new_learning_rate_on_resume"
    )
    assert done.returncode == 0, done.stderr
    assert "and not at" not in done.stderr
    for number in ("", "_1"):
        before, after = (
            torch.load(folder / f"optimizer{number}.bin", weights_only=True) for folder in (saved, tmp_path / "again")
        )
        (entry,) = after["param_groups"]
        assert (entry["initial_lr"], entry["lr"]) == (3e-6, pytest.approx(15e-6))
        scheduler = torch.load(tmp_path / "again" / f"scheduler{number}.bin", weights_only=True)
        assert scheduler["base_lrs"] == [3e-6]
        for key, state in after["state"].items():
            bumps = state["lr_mask"] - 3 * before["state"][key]["lr_mask"]
            assert bumps.abs().max() <= 2 * 3e-6 + 1e-12


def test_without_a_new_rate_nothing_is_said(saved, tmp_path):
    done = several(tmp_path / "again", "--resume", str(saved), "--new_learning_rate_on_resume")
    assert done.returncode == 0, done.stderr
    assert "and not at" not in done.stderr
    assert torch.load(tmp_path / "again" / "optimizer.bin", weights_only=True)["param_groups"][0]["initial_lr"] == 1e-6


def test_the_option_is_refused_for_another_optimizer():
    done = run("--new_learning_rate_on_resume", "--network_module", "x")
    assert done.returncode == 2
    assert "--new_learning_rate_on_resume is for Automagic_CameAMP" in done.stderr
    assert "loading the model" not in done.stdout


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_rescaled_optimizer_does_what_one_of_that_rate_would(optimizer_class, scheduler):
    """Without bumps the mask is the rate alone; a run begun at the new rate then ends where the rescaled one does."""
    from diffusers.optimization import get_scheduler

    def begin(lr):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = optimizer_class([{"params": [p], "lr": lr}], lr_bump=0.0, warmup_steps=10, weight_decay=0.0)
        return p, optimizer, get_scheduler(scheduler, optimizer, num_warmup_steps=4, num_training_steps=20)

    def train(p, optimizer, schedule, steps):
        for _ in steps:
            p.grad = torch.randn(64, 128)
            optimizer.step()
            schedule.step()

    p, optimizer, schedule = begin(1e-5)
    train(p, optimizer, schedule, range(6))
    lr = optimizer.param_groups[0]["lr"]
    rescale(optimizer, [4e-5])
    schedule.base_lrs = [4e-5]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4 * lr)
    mask = optimizer.get_lr_mask(p)
    assert mask.mean().item() == pytest.approx(4e-5, rel=0.01)
    train(p, optimizer, schedule, range(2))
    _, other, other_schedule = begin(4e-5)
    for _ in range(8):
        other.step()
        other_schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"])
    factor = other.param_groups[0]["lr"] / 4e-5
    if "COptim" not in optimizer_class.__name__:
        mean, _, _ = optimizer.effective_learning_rates()[0]
        assert mean == pytest.approx(4e-5 * factor, rel=0.01)


def test_the_new_mask_stays_within_its_bounds_and_keeps_its_shape():
    optimizer_class = OPTIMIZERS[0]
    p = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = optimizer_class([p], lr=1e-5, min_lr=1e-6, max_lr=1e-4, warmup_steps=100)
    for _ in range(5):
        p.grad = torch.randn(8, 8)
        optimizer.step()
    before = optimizer.get_lr_mask(p)
    assert before.unique().numel() > 2
    rescale(optimizer, [2e-5])
    assert torch.allclose(optimizer.get_lr_mask(p), 2 * before)
    rescale(optimizer, [1e-4])
    assert torch.allclose(optimizer.get_lr_mask(p), (10 * before).clamp(max=1e-4))
    rescale(optimizer, [0.0])
    assert optimizer.effective_learning_rates()[0] == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"parameter group 0: the new learning rate is 1; allowed: 0 or a number from"):
        rescale(optimizer, [1.0])
    with pytest.raises(ValueError, match="2 learning rates for 1 parameter groups"):
        rescale(optimizer, [1e-5, 1e-5])
    rescale(optimizer, [1e-5])
    assert optimizer.effective_learning_rates()[0] == pytest.approx((1e-5,) * 3)


# Steps and schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "warns"),
    [
        ({"resume": "state"}, True),
        ({"initial_step": 4}, True),
        ({"initial_epoch": 2}, True),
        ({}, False),
        ({"resume": "state", "gradient_accumulation_steps": 1}, False),
        ({"resume": "state", "skip_until_initial_step": False}, False),
    ],
)
def test_steps_that_the_host_counts_too_often_are_told(changed, warns, caplog):
    more = {"gradient_accumulation_steps": 3, "skip_until_initial_step": True}
    warn_of_miscounted_steps(host_args(**{**more, **changed}))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == warns
    assert all("count 3 times" in text and "--initial_step 0" in text for text in texts)


def test_that_warning_comes_before_the_model(tmp_path):
    done = run(
        "--optimizer_type", "Automagic_CameAMP", "--network_module", "x", "--skip_until_initial_step",
        "--gradient_accumulation_steps", "2", "--initial_step", "1",
    )  # fmt: skip
    assert "count 2 times" in done.stderr


@pytest.mark.parametrize(
    ("name", "steps", "warns"),
    [("cosine", 12, True), ("cosine", 8, False), ("linear", 12, False), ("constant", 12, False)],
)
def test_a_rate_that_grows_after_the_planned_end_is_told_once(name, steps, warns, caplog):
    from diffusers.optimization import get_scheduler

    optimizer = OPTIMIZERS[0]([torch.nn.Parameter(torch.ones(2, 2))], lr=1e-4)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=8)
    accelerator = SimpleNamespace(_schedulers=[SimpleNamespace(scheduler=schedule)], num_processes=1)
    watch = PlannedEnd([optimizer], host_args(lr_scheduler=name, max_train_steps=8), accelerator)
    with caplog.at_level(logging.WARNING):
        for _ in range(steps):
            watch.step_begins()
            optimizer.step()
            schedule.step()
    found = [record.getMessage() for record in caplog.records if "planned" in record.getMessage()]
    assert len(found) == warns
    assert all("schedule cosine was planned for the 8 steps" in text and "from 0 to" in text for text in found)


def test_a_resumed_run_that_goes_past_its_schedule_warns(tmp_path):
    words = [
        "--optimizer_type", "Automagic_CameAMP", "--learning_rate", "1e-4", "--network_module", "x",
        "--lr_scheduler", "cosine", "--output_dir", str(tmp_path / "state"),
    ]  # fmt: skip
    first = run(*words)
    assert (first.returncode, "grows again" in first.stderr) == (0, False), first.stderr
    again = run(*words, "--resume", str(tmp_path / "state"))
    assert (again.returncode, again.stderr.count("grows again")) == (0, 1), again.stderr

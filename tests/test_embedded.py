"""The embedded trainer, end to end: a real U-Net, real images, accelerate's loop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from library.cameamp_demo.data import BASE_DIGITS, NEW_DIGITS, Digits, held_out_batches, load, training_batch
from library.cameamp_demo.model import BASE_WEIGHTS, base_metadata, load_base
from library.cameamp_demo.network import LoRANetwork
from library.cameamp_demo.trainer import Trainer
from train_network_patch import main

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "train_network_patch.py"), "--embedded"]


def arguments(folder, *more, steps=6):
    return [
        "--embedded", "--output_dir", str(folder), "--output_name", "a", "--max_train_steps", str(steps),
        "--train_batch_size", "4", "--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-4",
        "--save_state", "--validate_every_n_steps", "0", "--optimizer_args", "warmup_steps=4", *more,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer held-out images and sampling steps: these tests ask whether, not how well. Accelerate's state is fresh."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def few(data, timesteps, repeats):
        return held_out_batches(Digits(data.images[:16], data.digits[:16]), timesteps, repeats=1)

    monkeypatch.setattr("library.cameamp_demo.trainer.held_out_batches", few)
    monkeypatch.setattr("library.cameamp_demo.pictures._SAMPLING_STEPS", 2)


def factors(path):
    return load_file(str(path))


def test_a_run_leaves_all_its_files(tmp_path, capsys):
    assert main(arguments(tmp_path, "--save_every_n_steps", "3")) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "a.safetensors", "a-step00000003.safetensors", "a-state", "a-step00000003-state", "a-samples.png",
        "a-course.png", "logs",
    }  # fmt: skip
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert (tmp_path / "a-samples.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    before, after = re.fullmatch(r"held-out loss before (0\.\d+), after (0\.\d+)", printed).groups()
    assert float(after) < float(before)


def test_the_lora_is_in_kohyas_format(tmp_path):
    main(arguments(tmp_path))
    tensors = factors(tmp_path / "a.safetensors")
    modules = {name.partition(".")[0] for name in tensors}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k" in modules
    assert "lora_unet_mid_block_attentions_0_proj_in" in modules
    for module in modules:
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        assert down.shape[0] == up.shape[1] == 4
        assert tensors[f"{module}.alpha"] == 2.0
    assert len(tensors) == 3 * len(modules)
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_optimizer"].startswith("library.automagic_cameamp.Automagic_CameAMP(lr=0.0001,")
    assert "warmup_steps=4" in metadata["ss_optimizer"]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("4", "2.0", "6")


def test_lora_starts_as_nothing_and_learns(tmp_path):
    base = load_base()
    batch = training_batch(load(NEW_DIGITS, held_out=False), 4, 1000, seed=0, number=0)
    with torch.no_grad():
        before = base.loss(batch)
        network = LoRANetwork(base, rank=4, alpha=2.0)
        assert torch.equal(network(batch), before)
    main(arguments(tmp_path))
    assert all(t.abs().sum() > 0 for name, t in factors(tmp_path / "a.safetensors").items() if "lora_up" in name)


def test_a_new_rate_at_a_resume_is_not_ignored_in_silence(tmp_path, caplog):
    main(arguments(tmp_path, steps=2))
    resume = ("--resume", str(tmp_path / "a-state"))
    for rate, count in (("1e-4", 0), ("3e-5", 1)):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(arguments(tmp_path / rate, *resume, "--learning_rate", rate, steps=3)) == 0
        texts = [record.getMessage() for record in caplog.records if "goes on at" in record.getMessage()]
        assert texts == ["--resume: the run goes on at the state's learning rate, 0.0001, and not at 3e-05"] * count


@pytest.mark.parametrize(
    ("at", "more"),
    [
        *((at, more) for at in (3, 5) for more in ((), ("--gradient_accumulation_steps", "2"))),
        (3, ("--mixed_precision", "bf16")),
    ],
)
def test_resuming_is_exact(tmp_path, at, more):
    more = (*more, "--lr_scheduler", "cosine")
    main(arguments(tmp_path / "straight", "--save_every_n_steps", str(at), *more))
    state = tmp_path / "straight" / f"a-step{at:08d}-state"
    main(arguments(tmp_path / "resumed", "--resume", str(state), *more))
    straight, resumed = (factors(tmp_path / run / "a.safetensors") for run in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    progress = [
        json.loads((tmp_path / run / "a-state" / "progress.json").read_text()) for run in ("straight", "resumed")
    ]
    assert progress[0]["history"]["loss"] == progress[1]["history"]["loss"]


def test_accumulation_averages_the_batches(tmp_path):
    """One step of two batches is two steps of half the rate, but for how little the weights move in between."""
    plain = ("--optimizer_type", "SGD", "--optimizer_args", "momentum=0.0", "--max_grad_norm", "0")
    main(arguments(tmp_path / "one", *plain, "--learning_rate", "5e-4", steps=2))
    main(arguments(tmp_path / "two", *plain, "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2", steps=1))
    one, two = (factors(tmp_path / run / "a.safetensors") for run in ("one", "two"))
    moved = [name for name in one if "up" in name]  # From 0.
    one, two = (torch.cat([run[name].flatten() for name in moved]) for run in (one, two))
    assert two.norm() > 0
    assert (one - two).norm() < 0.01 * two.norm()


def test_clipping_is_applied(tmp_path):
    # came divides the scale out; without it a gradient clipped to almost nothing takes other steps.
    options = ("--optimizer_args", "warmup_steps=4", "came=False")
    main(arguments(tmp_path / "one", *options, steps=3))
    main(arguments(tmp_path / "two", *options, "--max_grad_norm", "1e-4", steps=3))
    one, two = (factors(tmp_path / run / "a.safetensors") for run in ("one", "two"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_other_optimizers_can_be_compared(tmp_path):
    assert main([*arguments(tmp_path)[:-2], "--optimizer_type", "AdamW"]) == 0


def refused(capsys, *command):
    """The one line that a mistake is answered with."""
    assert main(list(command)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    line = [line for line in lines if line.startswith("error: ")]
    assert len(line) == 1
    return line[0]


def test_mistakes_are_one_line_and_change_nothing(tmp_path, capsys):
    main(arguments(tmp_path / "good"))
    before = (tmp_path / "good" / "a.safetensors").read_bytes()
    occupied = tmp_path / "file"
    occupied.write_text("x")
    assert "cannot write to the folder" in refused(capsys, *arguments(occupied / "below"))
    assert "nowhere" in refused(capsys, *arguments(tmp_path / "good", "--resume", str(tmp_path / "nowhere")))
    assert "max_train_steps" in refused(
        capsys, *arguments(tmp_path / "good", "--resume", str(tmp_path / "good" / "a-state"))
    )
    assert "'lr_scheduler' is 'zigzag'" in refused(capsys, *arguments(tmp_path / "good", "--lr_scheduler", "zigzag"))
    assert "'optimizer_type' is 'Adammm'" in refused(
        capsys, *arguments(tmp_path / "good")[:-2], "--optimizer_type", "Adammm"
    )
    assert "needs no closure" in refused(capsys, *arguments(tmp_path / "good")[:-2], "--optimizer_type", "LBFGS")
    assert (tmp_path / "good" / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors", "scheduler.bin", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_states_are_refused(tmp_path, capsys, name, damage):
    main(arguments(tmp_path / "good", "--save_every_n_steps", "3"))
    state = tmp_path / "good" / "a-step00000003-state"
    data = (state / name).read_bytes()
    (state / name).unlink()
    if damage == "truncated":
        (state / name).write_bytes(data[: len(data) // 2])
    before = (tmp_path / "good" / "a.safetensors").read_bytes()
    assert "cannot resume from" in refused(capsys, *arguments(tmp_path / "good", "--resume", str(state), steps=9))
    assert (tmp_path / "good" / "a.safetensors").read_bytes() == before


def test_state_of_another_rank_is_refused(tmp_path, capsys):
    main(arguments(tmp_path))
    other = arguments(tmp_path, "--network_dim", "8", "--resume", str(tmp_path / "a-state"), steps=9)
    assert "cannot resume from" in refused(capsys, *other)


def test_mistakes_are_found_before_torch_is_imported():
    code = (
        "import sys; from train_network_patch import main; "
        "status = main(['--embedded', '--optimizer_args', 'etta=1']); "
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: optimizer_args: unknown option 'etta', did you mean 'eta'?")


def test_without_embedded_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)  # A checkout of sd-scripts may lie beside this one, and would be found.
    assert "--embedded" in refused(capsys)


def test_optimizer_args_reach_other_optimizers(tmp_path, capsys):
    other = [*arguments(tmp_path)[:-2], "--optimizer_type", "AdamW", "--optimizer_args"]
    assert "nonsense" in refused(capsys, *other, "nonsense=3")
    assert main([*other, "weight_decay=0.5"]) == 0


def test_eight_bit_by_one_word(tmp_path):
    command = arguments(tmp_path, "--optimizer_type", "Automagic_CameAMP8bit", "--save_every_n_steps", "3")
    command[command.index("--network_dim") + 1] = "128"
    assert main(command) == 0
    saved = torch.load(tmp_path / "a-state" / "optimizer.bin", weights_only=True)
    assert any("exp_avg_q" in state for state in saved["state"].values())
    resumed = [*command, "--resume", str(tmp_path / "a-step00000003-state")]
    resumed[resumed.index(str(tmp_path))] = str(tmp_path / "again")
    assert main(resumed) == 0
    first, second = (factors(folder / "a.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_eight_bit_without_bitsandbytes_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert "pip install" in refused(capsys, *arguments(tmp_path, "--optimizer_type", "Automagic_CameAMP8bit"))


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_bootstrap_waits_for_what_it_started(tmp_path):
    """After Ctrl-C, which both of them get, the trainer still has a state to save."""
    code = (
        "import bootstrap, sys; bootstrap.PYTHON = sys.executable; "
        "bootstrap.install = lambda name: None; bootstrap.DEMO = ['-c', sys.argv[1]]; "
        "sys.exit(bootstrap.main(['demo']))"
    )
    child = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (time.sleep(1.5), "
        f"pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit(130))); "
        "print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, child], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_saves_a_state_to_resume_from(tmp_path):
    command = [*COMMAND, *arguments(tmp_path, steps=100_000)[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    seen = ""
    while "lr=" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(64)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in out
    state = Path(out.rpartition("--resume ")[2].strip())
    step = json.loads((state / "progress.json").read_text())["step"]
    assert main(arguments(tmp_path / "on", "--resume", str(state), steps=step + 2)) == 0


def test_held_out_loss_is_the_same_at_every_call(tmp_path):
    from library.cameamp_demo.options import parse

    trainer = Trainer(parse(arguments(tmp_path)))
    assert trainer.held_out_loss() == trainer.held_out_loss()


def test_data_is_split_once_and_for_all():
    for digits in (BASE_DIGITS, NEW_DIGITS):
        train, held_out = load(digits, held_out=False), load(digits, held_out=True)
        assert set(train.digits.tolist()) == set(held_out.digits.tolist()) == set(digits)
        assert len(held_out) > 150
        seen = {image.numpy().tobytes() for image in train.images}
        assert not any(image.numpy().tobytes() in seen for image in held_out.images)
    assert train.images.min() >= -1
    assert train.images.max() <= 1


def test_batches_depend_on_seed_and_number_alone():
    data = load(NEW_DIGITS, held_out=False)
    first = training_batch(data, 8, 1000, seed=1, number=5)
    torch.rand(7)
    again = training_batch(data, 8, 1000, seed=1, number=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.noise, training_batch(data, 8, 1000, seed=1, number=6).noise)


def test_base_weights_are_small_and_say_how_they_were_made():
    assert BASE_WEIGHTS.stat().st_size <= 4 * 1024 * 1024
    assert base_metadata()["digits"] == "0-4"
    assert float(base_metadata()["held_out_loss"]) < 0.05


def test_a_contextual_run_shows_its_context(tmp_path):
    command = arguments(tmp_path, "--optimizer_type", "Automagic_CameAMP_COptim", "--save_every_n_steps", "3")
    assert main(command) == 0
    state = tmp_path / "a-step00000003-state"
    straight = factors(tmp_path / "a.safetensors")
    history = json.loads((tmp_path / "a-state" / "progress.json").read_text())["history"]
    assert len(history["context"]) == 6
    multiplier, consistency, edge_cases = (
        history["context"][0][name] for name in ("multiplier", "consistency", "edge_cases")
    )
    assert multiplier == pytest.approx(1e-6 / 1e-4)
    assert (consistency, edge_cases) == (1.0, 0)
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    assert b"context/multiplier" in events.read_bytes()
    command = command[: command.index("--save_every_n_steps")] + ["--resume", str(state)]
    assert main(command) == 0
    assert all(torch.equal(straight[name], value) for name, value in factors(tmp_path / "a.safetensors").items())
    again = json.loads((tmp_path / "a-state" / "progress.json").read_text())["history"]
    assert again["context"] == history["context"]

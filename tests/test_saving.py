"""The embedded trainer's files: killed while saving, on a full disk, with what is hostile in names and files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from reliability.interrupted import Saver, full_disk, killed

from library.cameamp.options import parse_optimizer_args
from library.cameamp_demo import files
from library.cameamp_demo.options import UserError, parse

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("library.cameamp_demo.trainer._HELD_OUT_REPEATS", 1)


@needs_fork
def test_killed_at_any_point_of_saving(tmp_path):
    outcomes = killed(tmp_path, cases=10)
    assert sum(outcomes.values()) == 10
    assert outcomes["the state before is there"] > 0


@needs_fork
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    for message in full_disk(tmp_path, cases=3):
        assert "MiB free on that disk); what was saved before is still there" in message


@pytest.fixture(scope="module")
def saver(tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Saver(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def state(saver, tmp_path):
    """A copy of a saved state, to do harm to."""
    return shutil.copytree(saver.state, tmp_path / "a-state")


def refused(saver, folder):
    with pytest.raises(UserError) as raised:
        saver.trainer._load_state(folder)
    message = str(raised.value)
    assert message.startswith(f"cannot resume from {folder}: ")
    assert "\n" not in message
    return message


def test_every_file_of_a_state_is_checked(saver, state):
    names = [path.name for path in state.iterdir() if path.name != "digests.json"]
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "progress.json"} <= set(names)
    for name in names:
        data = (state / name).read_bytes()
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        (state / name).write_bytes(damaged)
        assert f"{name} is damaged" in refused(saver, state)
        (state / name).unlink()
        assert f"{name} is missing" in refused(saver, state)
        (state / name).write_bytes(data)
    (state / "more.pkl").write_bytes(b"")
    assert "more.pkl was not saved with it" in refused(saver, state)
    (state / "more.pkl").unlink()
    digests = state / "digests.json"
    digests.write_text(digests.read_text()[:-20])
    refused(saver, state)
    digests.unlink()
    assert "digests.json" in refused(saver, state)


class Hostile:
    """Executed when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin"])
def test_no_pickle_is_executed(saver, state, name, tmp_path):
    """Not even one that whoever made it has given the right digest."""
    proof = tmp_path / "executed"
    data = pickle.dumps(Hostile(proof))
    (state / name).write_bytes(data)
    digests = json.loads((state / "digests.json").read_text())
    digests[name] = hashlib.sha256(data).hexdigest()
    (state / "digests.json").write_text(json.dumps(digests))
    refused(saver, state)
    assert not proof.exists()
    pickle.loads(data).close()
    assert proof.exists()


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "open('x')", "lambda: 0", "(" * 5000 + ")" * 5000, "-" * 100_000 + "1"]
)
def test_no_option_is_evaluated(text):
    with pytest.raises(ValueError, match="allowed: a Python literal"):
        parse_optimizer_args([f"eta={text}"])


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/b", "..", ".", "", "a\\b", "C:a", "a\0b", "a\nb", "../../a-state", "sub/../../a"]
)
def test_output_names_stay_in_the_output_folder(name, tmp_path):
    with pytest.raises(UserError, match=r"option 'output_name' is .* a file name without a folder"):
        parse(["--embedded", "--output_dir", str(tmp_path), "--output_name", name])


def test_nothing_written_carries_the_environment(tmp_path, monkeypatch, caplog, capfd):
    """Tokens reach a trainer through its environment, and leave it nowhere."""
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("WANDB_API_KEY", "wandbsecretsecret")
    caplog.set_level("DEBUG")
    saver = Saver(tmp_path)
    saver.trainer._save("")
    saver.trainer.accelerator.init_trackers("a")
    saver.trainer.accelerator.end_training()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    out = "".join(capfd.readouterr()) + caplog.text
    for secret in ("hf_secretsecretsecret", "wandbsecretsecret"):
        assert secret.encode() not in written
        assert secret not in out


SECRET = "hf_secretsecretsecret"


@pytest.mark.parametrize(
    "words", [["--huggingface_token", SECRET], [f"--huggingface_token={SECRET}"], [SECRET], ["--seeed", "3", SECRET]]
)
def test_no_mistake_on_the_command_line_repeats_a_token(words):
    """A command line of sd-scripts, whose options the embedded trainer does not know."""
    with pytest.raises(UserError) as raised:
        parse(["--embedded", *words])
    assert SECRET not in str(raised.value)
    assert words[0].partition("=")[0] in str(raised.value) or words == [SECRET]


@pytest.mark.parametrize(
    "line",
    [
        "huggingface_token = {}", "huggingface_token = '{}", 'huggingface_token = "{}"', 'huggingface_token : "{}"',
        "huggingface_token = 12{}", 'huggingface_token = "x" {}', "{}", '"{}', "huggingface_token = {} = 3",
    ],
)  # fmt: skip
def test_no_mistake_in_a_file_repeats_a_token(line, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(line.format(SECRET), "utf-8")
    with pytest.raises(UserError, match=r"run.toml") as raised:
        parse(["--embedded", "--config_file", str(path)])
    assert SECRET not in str(raised.value)
    assert SECRET.replace("_", "") not in str(raised.value)  # As the parser reads a number.


# files.py ------------------------------------------------------------------------------------------------------------


def test_the_folder_before_is_found_where_replacing_it_broke_off(tmp_path):
    folder = tmp_path / "state"
    for text in ("first", "second"):
        (files.begin_folder(folder) / "x").write_text(text)
        files.take_place_of_folder(folder)
    assert (folder / "x").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    (files.begin_folder(folder) / "x").write_text("third")
    os.replace(folder, tmp_path / "state.previous")  # Killed between the two renamings.
    found = files.find_folder(folder)
    assert (found / "x").read_text() == "second"
    files.check_folder(found)
    (files.begin_folder(folder) / "x").write_text("fourth")
    files.take_place_of_folder(folder)
    assert (files.find_folder(folder) / "x").read_text() == "fourth"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_an_archive_without_its_end_takes_no_place(tmp_path):
    """torch 2.4 writes one, and no error, where a disk is full but for a few bytes."""
    folder = tmp_path / "state"
    for cut in (0, 1, 22, 100):
        path = files.begin_folder(folder) / "x.bin"
        torch.save({"a": torch.zeros(5)}, path)
        os.truncate(path, path.stat().st_size - cut)
        if cut:
            with pytest.raises(OSError, match=r"x.bin was written without its end"):
                files.take_place_of_folder(folder)
        else:
            files.take_place_of_folder(folder)
        files.check_folder(folder)
        torch.load(folder / "x.bin", weights_only=True)


def test_resume_takes_a_state_that_was_left_aside(tmp_path):
    aside = tmp_path / "a-state.previous"
    aside.mkdir()
    assert parse(["--embedded", "--resume", str(tmp_path / "a-state")]).options.resume
    aside.rmdir()
    with pytest.raises(UserError, match="which is not a folder"):
        parse(["--embedded", "--resume", str(tmp_path / "a-state")])

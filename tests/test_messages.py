"""Every message that a document quotes is what the code says: each is provoked here, and compared word for word."""

from __future__ import annotations

import copy
import logging
import re
import sys
from argparse import Namespace

import documents
import pytest
import torch
from accelerate.state import AcceleratorState
from documents import ROOT
from torch.distributed.tensor import Shard

from library.automagic_cameamp import Automagic_CameAMP, Automagic_CameAMP8bit, Automagic_CameAMP_COptim
from library.cameamp.command_line import UserError
from library.cameamp.sd_scripts.resuming import Resume
from library.cameamp.sd_scripts.settings import resolve
from library.cameamp.sharding import check_shards
from library.cameamp.storage.blockwise import Blockwise
from train_network_patch import main

QUOTING = ("docs/troubleshooting.md", "docs/migration.md", "docs/techniques/allora.md")
_IS_MESSAGE = re.compile(r"^(error|\w+Error|checkpoint|--resume|parameter group \d+|states of|\d+ of|none of)\b")


def quoted():
    """The messages of the documents: lines of text blocks, and the first cells of tables headed `message`."""
    found = set()
    for name in QUOTING:
        path = ROOT / name
        texts = [block.text for block in documents.blocks(path) if block.language == "text"]
        found |= {line for text in texts for line in text.splitlines() if _IS_MESSAGE.match(line)}
        for header, _, *rows in documents.tables(path):
            if header[0].strip() == "message":
                found |= {row[0].strip().strip("`") for row in rows}
    return sorted(found)


def error_of(call):
    """The message of what a call raises, and the same as Python prints it."""
    with pytest.raises(Exception) as caught:
        call()
    return {str(caught.value), f"{type(caught.value).__name__}: {caught.value}", f"error: {caught.value}"}


def stepped(optimizer_class, *shapes, groups=1, **options):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes or ((8, 8),)]
    optimizer = optimizer_class([{"params": parameters[number::groups]} for number in range(groups)], **options)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def from_shards():
    """What a first step says of parameters that others than FSDP2 have cut."""
    kinds = ({"_fsdp_flattened": True}, {"ds_id": 0}, {"device_mesh": None, "placements": (Shard(1),)})
    found = set()
    for marks in kinds:
        p = torch.nn.Parameter(torch.ones(8, 8))
        for name, value in marks.items():
            setattr(p, name, value)
        found |= error_of(lambda p=p: check_shards([([p], [p.shape])]))
    flat = torch.nn.Parameter(torch.ones(128))
    return found | error_of(lambda: check_shards([([flat], [torch.Size((8, 8))] * 2)]))


def from_command_lines(folder, capsys):
    def printed(*words):
        assert main(list(words)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    def of_file(text):
        (folder / "run.toml").write_text(text, "utf-8")
        return printed("--embedded", "--config_file", "run.toml")

    small = ["--embedded", "--network_dim", "2", "--train_batch_size", "2", "--validate_every_n_steps", "0"]
    assert main([*small, "--max_train_steps", "2", "--save_state", "--output_dir", str(folder)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    found = {
        printed("--embedded", "--optimizer_type", "Automagic_CameAMP9bit"),
        printed("--sd_scripts", "sd-script"),
        printed("--embedded", "--optimizer_args", "warmup_step=3"),
        of_file("learning_rate = 1.0\n"),
        of_file("[optimizer_config]\nbetas = [0.9, 0.999]\n"),
        of_file("[optimizer_config]\nlr = 1e-4\n"),
        of_file("\n[optimizer_config]\nbetas = [0.9, 0.99, 1]\n"),
        of_file('\noutput_dir = "C:\\models\\lora"\n'),
        printed("--embedded", "--resume", "output/none-state").removeprefix("error: "),
        printed(*small, "--max_train_steps", "2", "--output_dir", str(folder), "--resume", str(folder / "lora-state")),
    }
    return {line.replace(str(folder), "FOLDER").replace("\\", "/") for line in found}


def from_checkpoints():
    here = stepped(Automagic_CameAMP)
    two_groups = stepped(Automagic_CameAMP, (8, 8), (8, 8), groups=2)
    adamw = stepped(torch.optim.AdamW)
    damaged = copy.deepcopy(here.state_dict())
    damaged["state"][0]["exp_avg"] += 1
    older = copy.deepcopy(here.state_dict())
    older["magic8_version"] = 2
    for key in ("group_checksum", "state_checksums"):
        del older["param_groups"][0][key]
    found = error_of(lambda: two_groups.load_state_dict(here.state_dict()))
    for saved in (stepped(Automagic_CameAMP, (4, 8)).state_dict(), adamw.state_dict(), damaged, older):
        found |= error_of(lambda saved=saved: here.load_state_dict(saved))
    return found


def from_a_resume(folder):
    """What the plugin says of a state that does not fit; the warning of another rate goes to the log."""
    saved, built = stepped(Automagic_CameAMP), stepped(Automagic_CameAMP, lr=3e-6)
    accelerator = Namespace(_optimizers=[built], _schedulers=[])
    state = folder / "state"
    state.mkdir()
    (state / "optimizer.bin").touch()
    load_state = Resume([built]).loading(accelerator, lambda _: built.load_state_dict(saved.state_dict()))
    load_state(state)
    found = error_of(lambda: Resume([saved, built]).loading(accelerator, load_state)(state))
    return {line.replace(str(state), "FOLDER") for line in found}


def from_the_host(monkeypatch, folder):
    options = {"optimizer_type": "Automagic_CameAMP", "optimizer_args": None, "learning_rate": 1e-6}
    found = set()
    for changed in (
        {"deepspeed": True}, {"fused_backward_pass": True, "gradient_accumulation_steps": 2},
        {"fused_backward_pass": True, "mixed_precision": "fp16"}, {"lr_scheduler": "adafactor"}, {"unet_lr": 1.0},
        {"optimizer_type": "Automagic-CameAMP8bit"},
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            resolve(Namespace(**{"lr_scheduler": "constant", **options, **changed}))
        found.add(f"error: {caught.value}")
    found |= from_a_resume(folder)
    found |= from_shards()
    # What sd-scripts itself does with a name that it does not know.
    found |= error_of(lambda: getattr(torch.optim, "Automagic_CameAMP8bit"))  # noqa: B009
    with monkeypatch.context() as patched:
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            patched.delitem(sys.modules, name)
        patched.setattr(sys, "meta_path", [_Hidden(), *sys.meta_path])
        found |= error_of(lambda: Automagic_CameAMP8bit([torch.nn.Parameter(torch.ones(8, 8))]))
    return found


class _Hidden:
    """An import hook under which bitsandbytes is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")


def from_the_log(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    Automagic_CameAMP([{"params": [torch.nn.Parameter(torch.ones(8, 8))], "lr": 1}])
    saved = stepped(Automagic_CameAMP).state_dict()
    stepped(Automagic_CameAMP_COptim, warmup_steps=300).load_state_dict(saved)
    older = copy.deepcopy(saved)
    older["magic_version"] = 1
    for key in ("group_checksum", "state_checksums"):
        del older["param_groups"][0][key]
    stepped(Automagic_CameAMP).load_state_dict(older)
    pairs = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 8), (8, 2)) * 132]
    Automagic_CameAMP(pairs).step()
    pairs[0].grad = torch.ones(2, 8)
    Automagic_CameAMP(pairs).step()
    stepped(Automagic_CameAMP, *[(8, 8)] * 13, (8,))
    stepped(Automagic_CameAMP, *[(2, 8), (8, 2), (8,)] * 32)

    def fail(*_, **__):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(Blockwise, "new", fail)
    stepped(Automagic_CameAMP8bit, (64, 64))
    return {record.getMessage() for record in caplog.records}


def test_every_quoted_message_is_said(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("library.cameamp_demo.trainer._HELD_OUT_REPEATS", 1)
    monkeypatch.setattr("library.cameamp_demo.pictures._SAMPLING_STEPS", 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    said = from_command_lines(tmp_path, capsys) | from_checkpoints() | from_the_host(monkeypatch, tmp_path)
    said |= from_the_log(monkeypatch, caplog)
    assert len(quoted()) > 20
    assert [message for message in quoted() if message not in said] == []

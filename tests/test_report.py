"""One picture from a run's logs."""

from __future__ import annotations

import io
import sys

import pytest
from matplotlib import image
from torch.utils.tensorboard import SummaryWriter

from library.cameamp.command_line import UserError
from library.cameamp.sd_scripts.report import main, read_logs


def write_logs(folder, context="context", steps=5):
    writer = SummaryWriter(str(folder))
    for step in range(1, steps + 1):
        values = {"loss/current": 1 / step, "loss/average": 1 / step, "lr/unet": 1e-6}
        for what, factor in (("mean", 2), ("smallest", 1), ("largest", 5)):
            values[f"effective_lr/group0/{what}"] = factor * 1e-6 * step
        if context:
            values |= {f"{context}/multiplier": 1.5**step, f"{context}/edge_cases": step // 3}
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.add_scalar("loss/epoch_average", 0.5, 1)
    writer.close()


def test_the_newest_run_with_a_loss_is_read(tmp_path):
    write_logs(tmp_path / "run" / "network_train")
    other = SummaryWriter(str(tmp_path / "run" / "hyperparameters"))
    other.add_scalar("anything", 1.0, 0)
    other.close()
    steps, values = read_logs(tmp_path)["effective_lr/group0/largest"]
    assert steps == [1, 2, 3, 4, 5]
    assert values == pytest.approx([5e-6 * step for step in steps])


def test_a_picture_grows_with_what_there_is_to_show(tmp_path, capsys):
    heights = {}
    for context in ("", "context", "context1"):
        folder = tmp_path / f"with {context}"
        write_logs(folder, context)
        assert main([str(folder)]) == 0
        heights[context] = image.imread(folder / "report.png").shape[0]
    assert heights["context"] == heights["context1"] == pytest.approx(2 * heights[""], rel=0.02)
    assert main([str(tmp_path / "with context"), "--output", str(tmp_path / "here.png")]) == 0
    assert (tmp_path / "here.png").is_file()
    assert "here.png" in capsys.readouterr().out


def test_no_logs_are_told(tmp_path, capsys):
    other = SummaryWriter(str(tmp_path / "other"))
    other.add_scalar("loss_of_something_else", 1.0, 0)
    other.close()
    with pytest.raises(UserError, match="no tensorboard logs"):
        read_logs(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "no tensorboard logs" in capsys.readouterr().err


def test_what_is_not_installed_is_told(tmp_path, capsys, monkeypatch):
    write_logs(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_name_that_the_console_cannot_show(tmp_path, monkeypatch):
    folder = tmp_path / "出力"
    write_logs(folder)
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert main([str(folder)]) == 0
    console.flush()
    assert b"report.png" in console.buffer.getvalue()

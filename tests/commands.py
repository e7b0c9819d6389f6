"""Command lines of the documents, checked with the parsers that will read them. Nothing is run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

from documents import ROOT
from packaging.requirements import Requirement
from sd_scripts.options import check_arguments

import bootstrap
from library.cameamp.sd_scripts.main import _parser
from library.cameamp_demo.options import is_embedded, parse

# Words that stand for whatever the user writes there.
PLACEHOLDERS = ("OPTIONS",)

# The project's own, which `pip install ".[demo]"` names.
EXTRAS = ("demo", "benchmarks", "dev")


class ParsedError(Exception):
    """Raised by the patched parser instead of returning, so that nothing after it runs."""


def check(command, monkeypatch):
    """Assert that a command line of a document would be understood.

    The current folder must hold the files that the command names.
    """
    words = [word for word in shlex.split(command, comments=True) if word not in PLACEHOLDERS]
    while "=" in words[0]:
        words = words[1:]
    program, *rest = words
    if (program, rest[0]) == ("pip", "install"):
        _check_packages(rest[1:])
    elif program == "accelerate":
        _check_training(_launched(rest), monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        started = get_args_parser().parse_args(rest)
        assert (ROOT / started.training_script).is_file(), started.training_script
        script = started.training_script
        if script == "tests/reliability/fsdp_on_cpu.py":  # It has the trainer's command line.
            script = "train_network_patch.py"
        _check_training([script, *started.training_script_args], monkeypatch)
    else:
        assert program == "python", f"no parser is known for {program!r}"
        _check_python(rest, monkeypatch)


def _check_python(words, monkeypatch):
    if words[0] == "-m" and words[1] == "pytest":
        for path in (word for word in words[2:] if word.startswith("tests/")):
            assert (ROOT / path).exists(), path
    elif words[:2] == ["-m", "automagic_cameamp.sd_scripts"]:
        _check_training(words[1:], monkeypatch)
    elif words[0] == "-m":
        # What pip installs under the first name lies here under the second.
        name = re.sub(r"^automagic_cameamp\b", "library.cameamp", words[1])
        _check_module(name, words[2:], monkeypatch)
    elif words[0] == "bootstrap.py":
        _check_bootstrap(words[1:], monkeypatch)
    elif "train" in words[0]:
        _check_training(words, monkeypatch)
    else:
        assert (ROOT / words[0]).is_file(), words[0]
        # By its place in tests/, which is on the path: packages are known that install a module named tests.
        _check_module(words[0].removesuffix(".py").removeprefix("tests/").replace("/", "."), words[1:], monkeypatch)


def _check_module(name, words, monkeypatch):
    """What the module's own parser says; the module is stopped when it has parsed."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    source = Path(module.__file__).read_text("utf-8")
    assert "__main__" in source, f"{name} does nothing when it is run"
    if "argparse" not in source:
        assert not words, f"{name} takes no arguments"
        return
    original = argparse.ArgumentParser.parse_args

    def stop(parser, *_):
        original(parser, words)
        raise ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr("sys.argv", [name, *words])
        try:
            module.main(*([words] if module.main.__code__.co_argcount else []))
        except ParsedError:
            return
        except SystemExit as end:
            if end.code == 0 and "--help" in words:
                return
            raise
    raise AssertionError(f"{name} parsed nothing")


def _check_bootstrap(words, monkeypatch):
    """What bootstrap.py would run, without installing or running it."""
    ran = []
    with monkeypatch.context() as patched:
        patched.setattr(bootstrap, "install", lambda files: None)
        patched.setattr(bootstrap, "run", ran.append)
        assert bootstrap.main(words) == 0
    for arguments in ran[-1:]:
        _check_python(arguments, monkeypatch)


def _launched(words):
    """The script or module, and its arguments, that accelerate would launch."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])
    return [launch.training_script, *launch.training_script_args]


def _check_training(words, monkeypatch):
    script, *arguments = words
    if script not in ("train_network_patch.py", "automagic_cameamp.sd_scripts"):
        check_arguments(script.removesuffix(".py"), arguments, monkeypatch)
    elif script == "train_network_patch.py" and is_embedded(arguments):
        resumed = [value for option, value in pairwise(arguments) if option == "--resume"]
        for folder in resumed:
            Path(folder).mkdir(parents=True, exist_ok=True)
        parse(arguments)
    else:
        own, theirs = _parser().parse_known_args(arguments)
        check_arguments(own.train_script.removesuffix(".py"), theirs, monkeypatch)


def _check_packages(words):
    names = iter(words)
    for word in names:
        if word == "-r":
            path = next(names)
            assert (ROOT / path).is_file(), path
        elif found := re.fullmatch(r"\.(?:\[(.+)\])?", word):
            assert found[1] in (None, *EXTRAS), f"no extra {found[1]!r}"
        else:
            Requirement(word)

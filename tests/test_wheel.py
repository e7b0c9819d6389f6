"""The wheel: what it holds, what it needs, and that it does outside of a checkout what the checkout does."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import library.automagic_cameamp as family
from library.cameamp import __version__
from library.cameamp.command_line import OWN_OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "library" / "cameamp"
STAND_IN = ROOT / "tests" / "stand_in"
NAME = "automagic_cameamp"


def run(site, folder, *words, path=(), **environment):
    """Run Python in a folder, with the wheel and nothing of the checkout on the module search path."""
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, *path))), "SD_SCRIPTS_DIR": str(STAND_IN),
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment,
    }  # fmt: skip
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


def printed(site, folder, code, **more):
    """What a program prints, which must succeed."""
    done = run(site, folder, "-c", textwrap.dedent(code), **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# What it holds ------------------------------------------------------------------------------------------------------


def modules():
    """The Python files of the engine and the plugin, as paths below the package."""
    return {path.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("*.py")}


def test_every_folder_of_modules_is_listed_as_a_package():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)[1]
    folders = {Path(NAME, module).parent.as_posix().replace("/", ".") for module in modules()}
    assert sorted(ast.literal_eval(f"[{listed}]")) == sorted(folders)


def test_it_holds_the_engine_and_the_plugin_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (license_file,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert names == {f"{NAME}/{module}" for module in modules()} | {f"{NAME}/py.typed"}


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(path))


def test_its_version_is_the_packages(metadata):
    assert metadata["Version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## (\S+)", changes, re.M)[1] == __version__


def imported(path):
    """The packages that a file imports anywhere in it, without its own and Python's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


# What kernels need. Triton comes with PyTorch where there is one, in the version that fits.
OPTIONAL = {"triton", "numpy", "numba", "llvmlite"}


def test_it_depends_on_what_the_engine_imports(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    engine = [path for path in ENGINE.rglob("*.py") if "sd_scripts" not in path.parts and path.stem != "command_line"]
    assert {r.name for r in requirements if not r.marker} == set().union(*map(imported, engine)) - OPTIONAL


# Folders of scripts that tests start, and that import one another by name.
STARTED = ("tests/stand_in", "tests/sd_scripts", "tests/trainers")


@pytest.mark.parametrize("extra", ["demo", "benchmarks", "dev"])
def test_the_extras_bring_what_the_demo_the_benchmarks_and_the_tests_import(extra, metadata):
    folders = {"demo": ["library/cameamp_demo"], "benchmarks": ["benchmarks", "library/cameamp_demo"], "dev": ["tests"]}
    needed = set().union(*(imported(path) for folder in folders[extra] for path in (ROOT / folder).rglob("*.py")))
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    brought = {r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": extra})}
    modules = {{"scikit-learn": "sklearn", "pillow": "PIL"}.get(name, name.replace("-", "_")) for name in brought}
    beside = {path.stem for folder in (".", "tests", *STARTED) for path in (ROOT / folder).iterdir()}
    # Only a trainer's environment has its scripts; packaging comes with pytest.
    missing = needed - modules - beside - {
        "library", "train_network", "sdxl_train", "flux_train", "musubi_tuner", "lycoris", "packaging",
    }  # fmt: skip
    assert not missing - OPTIONAL


# The optimizers -----------------------------------------------------------------------------------------------------

TRAINING = """
    import pickle, sys, torch
    import automagic_cameamp

    for name in automagic_cameamp.__all__[:4]:
        optimizer_class = getattr(automagic_cameamp, name)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 64))
        # Kernels of another folder are compiled anew: those of one optimizer are, below.
        optimizer = optimizer_class([p], lr=1e-4, warmup_steps=2, fused=False)
        for _ in range(4):
            p.grad = torch.randn(64, 64)
            automagic_cameamp.report_loss(optimizer, 1.0)
            optimizer.step()
        torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, f"{name}.pt")
        assert pickle.loads(pickle.dumps(optimizer_class)) is optimizer_class
        print(f"{optimizer_class.__module__}.{optimizer_class.__qualname__}")
    assert "library" not in sys.modules
"""


def class_path(optimizer):
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def test_the_four_train_and_their_checkpoints_load_in_a_checkout(site, tmp_path):
    assert printed(site, tmp_path, TRAINING) == [f"{NAME}.{name}" for name in OWN_OPTIMIZERS]
    for name in OWN_OPTIMIZERS:
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 64))
        optimizer = getattr(family, name)([p], lr=1e-4, warmup_steps=2)
        optimizer.load_state_dict(saved["optimizer"])
        assert (
            optimizer.state_dict()["param_groups"][0]["state_checksums"]
            == (saved["optimizer"]["param_groups"][0]["state_checksums"])
        )
        p.grad = torch.ones(64, 64)
        optimizer.step()
        assert optimizer.state[p]["step"] == 5
        assert class_path(optimizer) == f"library.automagic_cameamp.{name}"


def test_options_are_checked_without_loading_torch(site, tmp_path):
    code = (
        "import sys; from automagic_cameamp import OptimizerConfig; print(OptimizerConfig().lr, 'torch' in sys.modules)"
    )
    assert printed(site, tmp_path, code) == ["1e-06 False"]


def test_the_package_shows_its_names_and_has_no_others(site, tmp_path):
    code = """
        import automagic_cameamp
        from automagic_cameamp import *
        assert set(automagic_cameamp.__all__) <= set(dir(automagic_cameamp)) & set(globals())
        print(report_loss.__name__, hasattr(automagic_cameamp, "Automagic_CameAMP9bit"))
    """
    assert printed(site, tmp_path, code) == ["report_loss False"]


@pytest.mark.parametrize("order", [(NAME, "library.automagic_cameamp"), ("library.automagic_cameamp", NAME)])
def test_a_second_copy_in_one_process_is_refused(order, site, tmp_path):
    done = run(site, tmp_path, "-c", f"import {order[0]}, {order[1]}", path=[ROOT])
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert str(site / NAME / "__init__.py") in message
    assert str(ENGINE / "__init__.py") in message
    assert "Use one name" in message


def test_type_checkers_see_the_signatures(site, tmp_path):
    pytest.importorskip("mypy")
    # An environment of its own, so that only py.typed makes mypy look into the installed package.
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "others.pth").write_text(f"{site}\n{Path(torch.__file__).parent.parent}\n", "utf-8")
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """\
            import torch
            from automagic_cameamp import Automagic_CameAMP_COptim8bit, OptimizerConfig, report_loss

            optimizer = Automagic_CameAMP_COptim8bit([torch.zeros(2)], OptimizerConfig(lr=1e-4))
            reveal_type(optimizer.get_learning_rates())
            OptimizerConfig(warmup_steps="many")
            Automagic_CameAMP_COptim8bit([torch.zeros(2)], 1e-4)
            report_loss(optimizer)
            """
        ),
        "utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    found = re.findall(r"^user\.py:(\d+): \w+: (.*)$", done.stdout, re.M)
    assert [(int(line), text.rpartition("  ")[2]) for line, text in found] == [
        (5, 'Revealed type is "list[float]"'),
        (6, "[arg-type]"),
        (7, "[arg-type]"),
        (8, "[call-arg]"),
    ], done.stdout + done.stderr


# The plugin, in a stand-in for sd-scripts ---------------------------------------------------------------------------

MODULE = ("-m", f"{NAME}.sd_scripts")
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *MODULE)


@pytest.mark.parametrize(
    ("program", "written"),
    [(MODULE, f"{NAME}.Automagic_CameAMP_COptim8bit"), (LAUNCH, "automagic_cameamp_coptim8BIT")],
    ids=["python", "accelerate"],
)
def test_it_trains_from_any_folder_with_workers_that_are_spawned(program, written, site, tmp_path):
    done = run(
        site, tmp_path, *program, "--sd_scripts", STAND_IN, "--optimizer_type", written, "--learning_rate", "1e-4",
        "--network_module", "x", "--optimizer_args", "warmup_steps=3", "--logging_dir", tmp_path / "logs",
        "--max_data_loader_n_workers", "2", WORKERS_IMPORT=NAME,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"ss_optimizer {NAME}.Automagic_CameAMP_COptim8bit(warmup_steps=3)" in done.stdout
    assert "2 of 2 parameters are LoRA factors" in done.stderr
    assert "do not work" not in done.stderr
    assert importlib.util.find_spec("numba") is None or "kernels take the steps" in done.stderr
    assert "lr=" in done.stderr
    lines = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("imported")]
    assert lines == [[str(site / NAME / "__init__.py"), str(STAND_IN / "library" / "train_util.py")]] * 2


def test_in_the_folder_of_a_checkout_it_is_still_the_wheel_that_runs(site):
    words = ["--optimizer_type", "library.automagic_cameamp.Automagic_CameAMP", "--network_module", "x"]
    done = run(site, ROOT, *MODULE, *words, "--max_train_steps", "1", WORKERS_IMPORT=NAME)
    assert done.returncode == 0, done.stderr
    assert f"ss_optimizer {NAME}.Automagic_CameAMP()" in done.stdout
    assert f"imported {site / NAME / '__init__.py'}" in done.stdout


def test_the_script_of_a_checkout_keeps_to_the_checkout_beside_an_installed_wheel(site, tmp_path):
    words = ["--optimizer_type", f"{NAME}.Automagic_CameAMP", "--network_module", "x", "--max_train_steps", "1"]
    done = run(site, tmp_path, ROOT / "train_network_patch.py", *words)
    assert done.returncode == 0, done.stderr
    assert "ss_optimizer library.automagic_cameamp.Automagic_CameAMP()" in done.stdout


def test_the_hosts_own_script_takes_the_dotted_name(site, tmp_path):
    words = ["--optimizer_type", f"{NAME}.Automagic_CameAMP8bit", "--optimizer_args", "warmup_steps=2"]
    done = run(site, tmp_path, STAND_IN / "train_network.py", *words, WORKERS_IMPORT=NAME)
    assert done.returncode == 0, done.stderr
    assert f"ss_optimizer {NAME}.Automagic_CameAMP8bit(warmup_steps=2)" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "out", "error"),
    [
        (("--help",), 0, "accelerate launch -m automagic_cameamp.sd_scripts", ""),
        (("--sd_scripts", "nowhere"), 2, "", "error: sd-scripts not found"),
        (("--optimizer_type", "Automagic_CameAMP", "--print_optimizer_config"), 0, "warmup_steps = 500", ""),
        (("--optimizer_type", "Automagic_CameAMP", "--optimizer_args", "etta=3"), 2, "", "did you mean 'eta'?"),
    ],
)
def test_its_command_line_shows_help_and_mistakes(words, code, out, error, site, tmp_path):
    done = run(site, tmp_path, *MODULE, *words)
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert error in done.stderr
    assert "Traceback" not in done.stderr


def test_without_what_sd_scripts_needs_it_says_so(site, tmp_path):
    (tmp_path / "toml.py").write_text("raise ModuleNotFoundError('No module named toml')", "utf-8")
    done = run(site, tmp_path, *MODULE, "--optimizer_type", "Automagic_CameAMP")
    assert done.returncode == 2
    assert "Activate the environment in which it runs" in done.stderr
    assert "Traceback" not in done.stderr

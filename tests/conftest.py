"""Fixtures and settings for all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports Triton: its kernels are interpreted in the tests, which need no GPU for it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import packaged
import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

settings.register_profile("project", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, and on the same number of threads.

    That is one where two tests run at a time: then threads would wait for each other.
    """
    torch.manual_seed(0)
    alone = "2" if "PYTEST_XDIST_WORKER" not in os.environ else "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", alone)))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The path of the wheel."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    return packaged.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def site(wheel):
    """A folder in which the wheel is installed, and nothing else."""
    return packaged.install(wheel, wheel.parent / "site")

"""The examples in the docstrings run and print what they say; every technique has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from torch._tensor_str import printoptions

from library import cameamp

PREFIX = "library.cameamp."
TECHNIQUES = f"{PREFIX}techniques."
MODULES = [
    module.name for module in pkgutil.walk_packages(cameamp.__path__, PREFIX) if not module.name.endswith("__main__")
]


# Packages that the engine does without.
OPTIONAL = {"triton"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"it needs {error.name}")
    # Examples are compared as text, so tensors are printed as torch prints them by default.
    with printoptions(profile="default"):
        found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0 or not name.startswith(TECHNIQUES), "a technique without an example"

"""Makes sd-scripts' package `library` importable."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def join(sd_scripts: Path) -> None:
    """Make sd-scripts' modules importable, here and in spawned worker processes, which inherit the search path.

    Installed by pip, this package shares no name with sd-scripts, whose folder comes first on the search path. In a
    checkout both have a package `library`. Then the checkout's folder comes first, and its `library/__init__.py` takes
    in the modules of every other package `library` on the path.
    """
    first = [str(sd_scripts)]
    if __name__.startswith("library."):
        first.insert(0, str(Path(__file__).resolve().parents[3]))
    sys.path[:] = dict.fromkeys([*first, *sys.path])
    library = importlib.import_module("library")
    package = str(sd_scripts / "library")
    # It may have been imported before sd-scripts was on the search path.
    if package not in library.__path__:
        library.__path__.append(package)

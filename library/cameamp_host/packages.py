"""Two packages named `library`, importable as one."""

from __future__ import annotations

import sys
from pathlib import Path

import library


def join(sd_scripts: Path) -> None:
    """Make sd-scripts' modules importable beside ours, here and in spawned worker processes.

    Our folder comes first on the search path, sd-scripts' second. Whoever imports `library` then gets ours, which takes
    in the submodules of every other `library` on the path. Workers inherit the search path, so they get the same.
    """
    ours = str(Path(__file__).resolve().parents[2])
    theirs = str(sd_scripts)
    sys.path[:] = [ours, theirs] + [entry for entry in sys.path if entry not in (ours, theirs)]
    package = str(sd_scripts / "library")
    if package not in library.__path__:
        library.__path__.append(package)

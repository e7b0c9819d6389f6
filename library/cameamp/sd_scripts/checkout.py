"""Finding sd-scripts and the training script to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..command_line import UserError
from ..options import nearest_name

# Every checkout has both files, and no other folder is likely to.
_MARKS = ("library/train_util.py", "train_network.py")


class SdScriptsNotFoundError(UserError):
    """There is no sd-scripts in any of the places in which it may be."""


def find_sd_scripts(given: str | None, environment: Mapping[str, str], folder: Path) -> Path:
    """The sd-scripts checkout to train with.

    Args:
        given: the value of `--sd_scripts`, if any.
        environment: the environment variables; `SD_SCRIPTS_DIR` counts if `given` is None.
        folder: the current folder. Without `given` and the variable it is tried, then `sd-scripts` in it and beside it.

    Returns:
        The checkout's absolute path.

    Raises:
        UserError: no checkout is there; with the files looked for and the folders tried.
    """
    if given is not None:
        places = {"--sd_scripts": folder / given}
    elif environment.get("SD_SCRIPTS_DIR"):
        places = {"SD_SCRIPTS_DIR": folder / environment["SD_SCRIPTS_DIR"]}
    else:
        places = {
            "the current folder": folder,
            "./sd-scripts": folder / "sd-scripts",
            "../sd-scripts": folder.parent / "sd-scripts",
        }
    for place in places.values():
        if all((place / mark).is_file() for mark in _MARKS):
            return place.resolve()
    tried = "; ".join(f"{name}, {place}: {_what_is_wrong(place)}" for name, place in places.items())
    raise SdScriptsNotFoundError(
        f"sd-scripts not found. Looked for a folder with {' and '.join(_MARKS)} in: {tried}. "
        "Name it with --sd_scripts or in the environment variable SD_SCRIPTS_DIR"
    )


def find_training_script(sd_scripts: Path, name: str) -> Path:
    """The script of sd-scripts, or of the user, to run.

    Raises:
        UserError: it does not exist; with the nearest name, or with the scripts that do.
    """
    for path in (sd_scripts / name, Path(name)):
        if path.is_file():
            return path.resolve()
    known = sorted(path.name for path in sd_scripts.glob("*.py") if "train" in path.name)
    nearest = nearest_name(name, known) or f"; it has {', '.join(known)}"
    raise UserError(f"--train_script is {name!r}, which {sd_scripts} does not have{nearest}")


def _what_is_wrong(place: Path) -> str:
    if not place.is_dir():
        return "not a folder"
    missing = [mark for mark in _MARKS if not (place / mark).is_file()]
    return f"no {' and no '.join(missing)}"

"""Files that are either complete or not there: written under another name, flushed to the disk, and only then renamed.

A process may be killed between any two lines here. Before the renaming the earlier file is in place, after it the new
one. A folder cannot be renamed to the name of an existing one, so the earlier folder is renamed first; if the process
is killed in between, `find_folder` finds it under that name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

_DIGESTS = "digests.json"


def beside(path: Path) -> Path:
    """The path under which a file or folder is written before it takes its place."""
    return path.with_name(path.name + ".partial")


def _earlier(folder: Path) -> Path:
    return folder.with_name(folder.name + ".previous")


def find_folder(folder: Path) -> Path | None:
    """The folder, or the earlier one if a process was killed while replacing it; None if neither exists."""
    return next((place for place in (folder, _earlier(folder)) if place.is_dir()), None)


def take_place_of_file(path: Path) -> None:
    """Put the file that was written to `beside(path)` in its place."""
    _flush(beside(path))
    os.replace(beside(path), path)
    _flush(path.parent)


def begin_folder(folder: Path) -> Path:
    """Make the empty folder `beside(folder)` to write in. Whatever a killed process left there is deleted."""
    partial = beside(folder)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def take_place_of_folder(folder: Path) -> None:
    """Put the folder that was written to `beside(folder)` in its place, with a digest of each of its files."""
    partial, earlier = beside(folder), _earlier(folder)
    for path in _files(partial):
        _check_archive(path)
    digests = json.dumps(_digests(partial), indent=1)
    (partial / _DIGESTS).write_text(digests, encoding="utf-8")
    for path in [*_files(partial), partial]:
        _flush(path)
    if folder.exists():
        if earlier.exists():
            shutil.rmtree(earlier)
        os.replace(folder, earlier)
    os.replace(partial, folder)
    _flush(folder.parent)
    if earlier.exists():
        shutil.rmtree(earlier)


def check_folder(folder: Path) -> None:
    """Check that every file is as it was written.

    Raises:
        ValueError, OSError: a file is missing, damaged or was added; the message names it.
    """
    expected = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
    found = _digests(folder)
    if not isinstance(expected, dict):
        raise ValueError(f"{_DIGESTS} is damaged")
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} was not saved with it")
        if found[name] != expected[name]:
            raise ValueError(f"{name} is damaged: it is not what was saved")


def _check_archive(path: Path) -> None:
    """Check that an archive has its end: torch 2.4 reports no error if the end did not fit on the disk."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive and not zipfile.is_zipfile(path):
        raise OSError(f"{path.name} was written without its end")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in _files(folder):
        if path.name != _DIGESTS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
            digests[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return digests


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk, before anything that depends on it. Windows cannot do this for a folder."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Finished runs in a file, so that a study of hours can be stopped and started again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Finished:
    """Results by name, in a file that is written again after each new result, one result a line.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this name, which is made and written if the file does not have it."""
        if name not in self.results:
            self.results[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.results.items())
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            os.replace(partial, self.path)
        return self.results[name]

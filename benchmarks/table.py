"""Tables that are printed row by row, as soon as a row is known."""

from __future__ import annotations

import re
from typing import Any


class Table:
    """Prints its headings when it is made, and a row at each call of `row`.

    Args:
        layout: a format string with a width and an alignment for each column, such as "{:<36}{:>12.1f}{:>8.1%}".
        headings: the columns' headings, in the same widths.
    """

    def __init__(self, layout: str, *headings: object) -> None:
        self._layout = layout
        # Headings are text: they take the widths of the columns without the formats of the numbers.
        print(re.sub(r"\.\d+[ef%]", "", layout).format(*map(str, headings)), flush=True)

    def row(self, *cells: Any) -> None:
        """Print one row."""
        print(self._layout.format(*cells), flush=True)

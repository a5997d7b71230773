"""Tables as plain lines, for files and pipes: no box characters, at most 80 columns, no value cut.

A table that is too wide folds its first column. If the others alone are too wide, each row becomes a block of lines,
one a value. Only a value that is wider than a line itself makes a line wider.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

PLAIN_WIDTH = 80  # columns of a line
GAP = "  "
LEAST_FIRST = 16  # columns that a folded first column keeps


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = PLAIN_WIDTH) -> list[str]:
    """Return the lines of a table. Columns after the first are right-aligned."""
    cells = [[" ".join(cell.split()) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    free = width - sum(len(GAP) + other for other in widths[1:])
    if free < min(widths[0], LEAST_FIRST):
        return [line for row in cells[1:] for line in _block(cells[0], row)]
    widths[0] = min(widths[0], free)
    return [line for row in cells if any(row) for line in _folded(row, widths)]


def _folded(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Yield a row as lines: its first cell folded to its column's width, the others on the first of them."""
    first, *more = textwrap.wrap(row[0], widths[0]) or [""]
    others = [cell.rjust(space) for cell, space in zip(row[1:], widths[1:], strict=True)]
    yield GAP.join([first.ljust(widths[0]), *others]).rstrip()
    yield from more


def _block(header: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    """Yield a row as a line of its first cell and a line for each other cell that is not empty; a pair as one line."""
    if len(row) == 2:
        yield GAP.join(row)
        return
    space = max(map(len, header[1:]))
    yield row[0]
    yield from (f"{GAP}{name.ljust(space)}{GAP}{cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell)

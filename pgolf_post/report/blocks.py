"""Parts that a section of a report is made of: figures with the tables of their numbers, tables, trees, commands.

Plain values, made by the files of `sections/` and turned into HTML by `page/render.py`. Text is text here: escaping is
the page's business, and no section writes HTML. A figure is a Plotly figure as JSON values; `label` escapes what Plotly
would take for markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

OPEN_DEPTH = 3  # levels of a tree that are unfolded at first


class Cell(NamedTuple):
    """A cell of a table: what is shown, and the number that it is sorted by, if it is one."""

    shown: str
    value: float | None = None


def number(value: float | None, form: str = ",", suffix: str = "") -> Cell:
    """Return a number's cell; an empty one for None."""
    return Cell("") if value is None else Cell(format(value, form) + suffix, float(value))


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column."""

    kind: ClassVar[str] = "table"
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    note: str = ""

    @cached_property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers: they are aligned right."""
        columns = zip(*self.rows, strict=True) if self.rows else [() for _ in self.header]
        return [any(cell.value is not None for cell in column) for column in columns]


@dataclass(frozen=True)
class Figure:
    """A Plotly figure, its summary in a sentence, and the table that says the same."""

    kind: ClassVar[str] = "figure"
    title: str
    summary: str  # of what can be seen: read aloud, and printed below
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    table: Table
    height: int = 420  # pixels


@dataclass(frozen=True)
class Branch:
    """A node of a tree that can be folded."""

    text: str
    children: list[Branch] = field(default_factory=list)


class Step(NamedTuple):
    """A tag of a tree's list: a leaf, the beginning of a node that can be folded, or its end."""

    kind: Literal["leaf", "open", "close"]
    text: str = ""
    children: int = 0  # directly below it
    is_open: bool = False  # unfolded at first


@dataclass(frozen=True)
class Tree:
    """Trees that can be folded."""

    kind: ClassVar[str] = "tree"
    title: str
    roots: list[Branch]

    def steps(self) -> Iterator[Step]:
        """Yield the page's order of tags, without recursion: a log of a year is a deep tree."""
        pending: list[tuple[Branch | None, int]] = [(root, 0) for root in reversed(self.roots)]
        while pending:
            branch, depth = pending.pop()
            if branch is None:
                yield Step("close")
            elif not branch.children:
                yield Step("leaf", branch.text)
            else:
                yield Step("open", branch.text, len(branch.children), depth < OPEN_DEPTH)
                pending.append((None, depth))
                pending += [(child, depth + 1) for child in reversed(branch.children)]


@dataclass(frozen=True)
class Commands:
    """Commands to copy, each with what it made."""

    kind: ClassVar[str] = "commands"
    title: str
    rows: list[tuple[str, str]]  # what it made, the command


Block = Figure | Table | Tree | Commands


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own."""

    name: str  # its anchor: letters and dashes
    title: str
    blocks: list[Block]
    note: str = ""


def label(text: str) -> str:
    """Return a text as Plotly shows it literally: Plotly reads tags and entities in labels."""
    return html.escape(text, quote=False)


def lines(parts: Sequence[str], width: int = 60) -> str:
    """Return parts as lines of a hover label, long ones broken; each is shown literally."""
    broken = [part[start : start + width] for part in parts for start in range(0, max(1, len(part)), width)]
    return "<br>".join(label(line) for line in broken)


def cut(text: str, width: int = 48) -> str:
    """Return a text of at most `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"

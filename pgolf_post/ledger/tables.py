"""The tables of a document: all of them, with their headings, every cell as the text it is.

Four forms are read. `markdown`: pipes, with a separator line under the header. `csv`: commas, semicolons or tabs, a
whole file. `tabs`: blocks of lines with tabs, as copied from a spreadsheet. `rendered`: what is left of a table that
was copied from a rendered page and lost its borders; such a line can be cut into cells only where its header names
columns of known shape (a number, a name, a base, one word of verdict) with one free text at most between two of them.

A line inside a table whose only cell is in bold (of a rendered table: that does not begin with a number) is a heading
of the rows below it, not a row.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pgolf_post.base.paths import absent
from pgolf_post.errors import DamagedFileError, NotFoundError
from pgolf_post.ledger.foreign_columns import Field, field_of, is_blank, parse_number

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
Form = Literal["markdown", "csv", "tabs", "rendered", "page"]
SEPARATOR = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
CLEAR_SEPARATOR = re.compile(
    r"^\s*\|?\s*:?-{3,}:?\s*(\|\s*:?-{3,}:?\s*)*\|?\s*$"
)  # amid rows, where dashes may say nothing
UNESCAPED_PIPE = re.compile(r"(?<!\\)\|")
HEADING = re.compile(r"^\s{0,3}#{1,6}\s+(?P<text>\S.*?)\s*#*\s*$")
MAX_TITLE = 120
MIN_TAB_COLUMNS, MIN_RENDERED_COLUMNS, MIN_SECTION_COLUMNS = 3, 4, 3

CELL_SHAPES: dict[Field, str] = {  # of a rendered table; what is not here is free text
    "number": r"\d+[a-z]?",
    "name": r"\S+(?: \([^)]*\))?",
    "base": r"PR #\d+|\S+",
    "result": r"Baseline|Positive|Negative|Neutral|Not run|No-op|NO-OP|Mixed|Pending|Failed",
    "bpb": r"\d\.\d+|—|-",
}


@dataclass(frozen=True)
class Table:
    """One table. Every row is as wide as the header."""

    title: str
    form: Form
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sections: tuple[str, ...]  # of each row: the heading line inside the table that it stands under
    line: int  # of the header, from 1
    number: int = 0  # in the document, from 1
    unsplit: tuple[int, ...] = ()  # indices of rendered rows that could not be cut: number, and the rest as the name


def read_text(path: Path) -> str:
    """Return a log's text. Raises NotFoundError, DamagedFileError."""
    try:
        return _text(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(absent(path)) from None
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not UTF-8 text: {error}", hint="save it as UTF-8") from None


def read_tables(path: Path, may_lack: bool = False) -> list[Table]:
    """Return a file's tables, numbered. Raises NotFoundError if no file or (unless it may) no table is there.

    Raises DamagedFileError for a file that cannot be read.
    """
    text = read_text(path)
    is_sheet = path.suffix.lower() in (".csv", ".tsv")
    tables = [_sheet(text, path)] if is_sheet else find_tables(text)
    if not (may_lack and not tables) and not any(table.header for table in tables):
        raise NotFoundError(
            f"{path} holds no table that can be read: no pipes with a |---| line, no tabs, no header of known columns",
            hint="pgolf-post ledger import FILE.csv   (a spreadsheet exports CSV)",
        )
    return [replace(table, number=number) for number, table in enumerate(_distinct_titles(tables), start=1)]


def _text(data: bytes) -> str:
    """Return a file's text: UTF-16 where it begins with its mark, else UTF-8; without NULs at its end."""
    encoding = "utf-16" if data[:2] in UTF16_MARKS and len(data) % 2 == 0 else "utf-8-sig"
    return data.decode(encoding).rstrip("\0\r\n ").replace("\r\n", "\n") + "\n"


def find_tables(text: str) -> list[Table]:
    """The tables in a text that is not one sheet, in order."""
    lines = text.split("\n")
    tables, at = [], 0
    while at < len(lines):
        table, end = _markdown(lines, at) or _tabs(lines, at) or _rendered(lines, at) or (None, at + 1)
        tables += [] if table is None else [table]
        at = end
    return tables


Found = tuple[Table, int] | None  # a table and the line after it


def _markdown(lines: Sequence[str], at: int) -> Found:
    if not _is_markdown_header(lines, at):
        return None
    end = at + 2
    while end < len(lines) and "|" in lines[end] and not _is_markdown_header(lines, end, CLEAR_SEPARATOR):
        end += 1
    cells = [_pipe_cells(line) for line in lines[at + 2 : end]]
    return _table(_title(lines, at), "markdown", _pipe_cells(lines[at]), cells, at), end


def _is_markdown_header(lines: Sequence[str], at: int, separator: re.Pattern[str] = SEPARATOR) -> bool:
    if "|" not in lines[at] or SEPARATOR.match(lines[at]) or at + 1 >= len(lines):
        return False
    return "|" in lines[at + 1] and bool(separator.match(lines[at + 1]))


def _pipe_cells(line: str) -> list[str]:
    inner = line.strip()
    inner = inner[1:] if inner.startswith("|") else inner
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|").replace("\\\\", "\\") for cell in UNESCAPED_PIPE.split(inner)]


def _tabs(lines: Sequence[str], at: int) -> Found:
    header = _tab_cells(lines[at])
    if len(header) < MIN_TAB_COLUMNS or any(is_blank(cell) for cell in header):
        return None
    end = at + 1
    while end < len(lines) and lines[end].strip() and ("\t" in lines[end] or end + 1 < len(lines)):
        if "\t" not in lines[end] and "\t" not in lines[end + 1]:
            break
        end += 1
    if end == at + 1:
        return None
    return _table(_title(lines, at), "tabs", header, [_tab_cells(line) for line in lines[at + 1 : end]], at), end


def _tab_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.rstrip("\n").split("\t")]


def _rendered(lines: Sequence[str], at: int) -> Found:
    fields = _rendered_header(lines[at])
    if fields is None:
        return None
    pattern = re.compile(" ".join(f"(?P<{field}>{CELL_SHAPES.get(field, '.+?')})" for _, field in fields[:-1]))
    end = next((i for i in range(at + 1, len(lines)) if not lines[i].strip()), len(lines))
    cells, unsplit, count = [], [], 0
    for line in lines[at + 1 : end]:
        if not re.match(r"\d+[a-z]?\s", line):
            cells.append([line.strip()])
            continue
        matched = pattern.match(line)
        last = line[matched.end() :] if matched else ""
        if matched is not None and (not last or last.startswith(" ")):
            cells.append([*matched.groups(), last.strip()])
        else:
            number, _, rest = line.strip().partition(" ")
            cells.append([number, rest.strip()] + [""] * (len(fields) - 2))
            unsplit.append(count)
        count += 1
    if not count:
        return None
    return replace(
        _table(_title(lines, at), "rendered", [n for n, _ in fields], cells, at), unsplit=tuple(unsplit)
    ), end


def _rendered_header(line: str) -> list[tuple[str, Field]] | None:
    """Header words and their fields, if every word is a column of its own and the cells between them can be cut."""
    words = line.split()
    fields = [field_of(word) for word in words]
    known = [field for field in fields if field is not None]
    is_free = [field not in CELL_SHAPES for field in known]
    unclear = any(first and second for first, second in itertools.pairwise(is_free))
    fits = len(known) == len(words) == len(set(known)) >= MIN_RENDERED_COLUMNS and known[:2] == ["number", "name"]
    return list(zip(words, known, strict=True)) if fits and not unclear else None


def _sheet(text: str, path: Path) -> Table:
    """A whole file of separated values; the delimiter is the one that its first line has most of, or `sep=;` names."""
    first, _, rest = text.partition("\n")
    named = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)
    delimiter = named[1] if named else max(",;\t", key=first.count)
    try:
        read = csv.reader(io.StringIO(rest if named else text, newline=""), delimiter=delimiter)
        cells = [[cell.strip() for cell in row] for row in read if row]
        _require_closed_quotes(rest if named else text, delimiter)
    except csv.Error as error:
        raise DamagedFileError(f"{path} cannot be read as separated values: {error}") from None
    cells = [row for row in cells if any(row)]
    if cells and any(parse_number(cell) is not None for cell in cells[0]) and not any(map(_is_known, cells[0])):
        raise DamagedFileError(
            f"{path}: its first line names no columns: {', '.join(cells[0])[:MAX_TITLE]}",
            hint="add a line of names, such as name,val_bpb,bytes,notes",
        )
    return _table(path.stem, "csv", cells[0] if cells else [], cells[1:], 0)


def _is_known(name: str) -> bool:
    """Whether a heading is a name of a number's column: what a line of values does not hold."""
    return field_of(name) in ("number", "name", "bpb", "delta_bpb", "artifact_bytes", "total_bytes")


def _require_closed_quotes(text: str, delimiter: str) -> None:
    """Raise csv.Error for a quote that is never closed, which would take in all lines after it."""
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise csv.Error("a quotation mark is opened and never closed") from None


def _table(title: str, form: Form, header: Sequence[str], cells: Sequence[Sequence[str]], at: int) -> Table:
    """A table of equal width, its inner headings taken out of the rows. Nothing is cut off: columns are added."""
    width = max([len(header), *(len(row) for row in cells)])
    names = [*header, *(f"column {n + 1}" for n in range(len(header), width))]
    rows, sections, section = [], [], ""
    for row in cells:
        if form in ("markdown", "rendered") and len(names) >= MIN_SECTION_COLUMNS and _is_section(row, form):
            section = _plain(row[0])
            continue
        rows.append((*row, *[""] * (width - len(row))))
        sections.append(section)
    return Table(title, form, _distinct_names(names), tuple(rows), tuple(sections), at + 1)


def _is_section(row: Sequence[str], form: Form) -> bool:
    return not any(row[1:]) and (form == "rendered" or bool(re.fullmatch(r"(\*\*|__).+\1", row[0])))


def _distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return column names that differ: an empty or repeated one has its column's number added."""
    distinct: list[str] = []
    for number, name in enumerate(names, start=1):
        plain = name or f"column {number}"
        distinct.append(plain if plain not in distinct else f"{plain} (column {number})")
    return tuple(distinct)


def _distinct_titles(tables: Sequence[Table]) -> Iterator[Table]:
    counts: dict[str, int] = {}
    for table in tables:
        counts[table.title] = counts.get(table.title, 0) + 1
        again = counts[table.title]
        yield table if again == 1 else replace(table, title=f"{table.title} ({again})")


def _title(lines: Sequence[str], at: int) -> str:
    """Return a table's title: the line of text before it if that is not another table's, else its last heading."""
    for before in range(at - 1, -1, -1):
        line = lines[before].strip()
        if not line or "|" in line or "\t" in line:
            continue
        heading = HEADING.match(line)
        return _plain(heading["text"] if heading else line)[:MAX_TITLE]
    return "untitled"


def _plain(text: str) -> str:
    return text.strip().strip("*_`# ").strip()

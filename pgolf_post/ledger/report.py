"""Reports of the ledger for people: rows as a table, one row whole, what was scanned and imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf_post.base.progress import print_table, say, terminal_width
from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.ledger.phases import HEADER as PHASES_HEADER
from pgolf_post.ledger.phases import LIMIT_SECONDS, ChainPhase, phase_rows, phases_of, sums
from pgolf_post.ledger.query import MISSING, bpb_of, counted_bytes, value_of
from pgolf_post.ledger.schema import KINDS, Row

if TYPE_CHECKING:
    from pgolf_post.ledger.importing import Imported

HEADER = ("id", "kind", "run", "name", "bpb", "bytes", "seconds", "$", "verdict", "conclusion")
ELASTIC, MIN_TEXT = ("name", "conclusion"), 12  # columns that are cut to fit the terminal, and their least width


def show_rows(title: str, rows: Sequence[Row], keys: Sequence[str] = ()) -> None:
    """Print rows as a table as wide as the terminal: empty columns are left out, name and conclusion are cut.

    `keys` of result and settings are shown as further columns. Raises SettingsError for one that no row has.
    """
    lacking = [key for key in keys if rows and all(value_of(row, key) is MISSING for row in rows)]
    if lacking:
        raise SettingsError(f"--show {', '.join(lacking)}: none of the {len(rows)} rows has it")
    cells = [(*_cells(row), *(_shown(value_of(row, key)) for key in keys)) for row in rows]
    header = (*HEADER, *keys)
    used = [n for n, name in enumerate(header) if name == "id" or any(row[n] for row in cells)]

    # what the other columns leave is shared by name and conclusion
    widths = {header[n]: max([len(header[n]), *(len(row[n]) for row in cells)]) for n in used}
    free = terminal_width() - 1 - sum(3 + width for name, width in widths.items() if name not in ELASTIC) - 8
    name_width = max(MIN_TEXT, min(widths.get("name", 0), free - min(widths.get("conclusion", 0), free // 2)))
    limits = {"name": name_width, "conclusion": max(MIN_TEXT, free - min(name_width, widths.get("name", 0)))}
    cut = [tuple(_cut(row[n], limits.get(header[n], len(row[n]))) for n in used) for row in cells]
    print_table(title, [header[n] for n in used], cut)


def _shown(value: object) -> str:
    """Return a value as a cell: numbers in five digits, lists with commas."""
    if value is MISSING or value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cells(row: Row) -> tuple[str, ...]:
    bpb, num_bytes = bpb_of(row), counted_bytes(row)
    numbers = ("" if bpb is None else f"{bpb:.5f}", "" if num_bytes is None else f"{num_bytes:,}")
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    dollars = "" if row.cost_dollars is None else f"{row.cost_dollars:.2f}"
    failed = f"error: {row.result['error']}" if row.result.get("error") else ""
    stopped = f"stopped early: {row.result['stopped_early']}" if row.result.get("stopped_early") else ""
    said = " ".join((row.conclusion or failed or stopped).split())
    return (
        _cut(row.id, 12),
        row.kind,
        _cut(row.run, 20),
        row.name,
        *numbers,
        seconds,
        dollars,
        row.verdict or "",
        said,
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def show_row(row: Row, notes: Sequence[Row]) -> None:
    """Print one row whole, a line per value that it has, and its notes. Nothing is cut."""
    cells = [(key, str(value)) for key, value in vars(row).items() if not isinstance(value, dict | tuple)]
    cells[2:2] = [(f"parent {number + 1}", parent) for number, parent in enumerate(row.parents)]
    cells += [
        (f"{part}.{key}", str(value)) for part in ("settings", "result") for key, value in vars(row)[part].items()
    ]
    cells += [(f"note, {note.created}", f"{note.verdict or ''} {note.conclusion}".strip()) for note in notes]
    for key, value in cells:
        if value not in ("None", ""):
            say(f"{key:<{max(len(name) for name, _ in cells)}}  {value}")


def show_chain(row: Row, phases: Sequence[ChainPhase]) -> None:
    """Print the phases of a row's chain and their sums. Raises NotFoundError where none is recorded."""
    if not phases:
        raise NotFoundError(
            f"no seconds by phase are recorded of {row.kind} {row.name or row.id[:12]}, nor of what it was made of",
            hint="pgolf-post ledger scan   (reads them from the folders)",
        )
    print_table(row.name or row.id[:12], PHASES_HEADER, phase_rows(phases))


def show_phase_sums(rows: Sequence[Row]) -> None:
    """Print the sums of each row's own phases."""
    header = ("id", "kind", "run", "name", "training, strict", "by convention", "evaluation, strict", "by convention")
    cells = []
    for row in rows:
        found = sums(phases_of(row))
        numbers = [found[f"{limit}_{how}_seconds"] for limit in LIMIT_SECONDS for how in ("strict", "convention")]
        seconds = [f"{number:,.1f}" if number else "" for number in numbers]
        cells.append((_cut(row.id, 12), row.kind, _cut(row.run, 20), row.name, *seconds))
    print_table(f"{len(rows)} rows with seconds by phase", header, cells)


def show_scan(root: Path, rows: Sequence[Row], new: Sequence[bool]) -> dict[str, int]:
    """Print how many rows of each kind are on disk, and how many of them were new. Return the counts by kind."""
    counts = {kind: sum(row.kind == kind for row in rows) for kind in KINDS}
    table = [
        (kind, str(count), str(sum(fresh for row, fresh in zip(rows, new, strict=True) if row.kind == kind)))
        for kind, count in counts.items()
        if count
    ]
    print_table(f"{root}: {len(rows)} rows, {sum(new)} of them new", ("kind", "on disk", "new"), table)
    return {str(kind): count for kind, count in counts.items()}


def show_import(imported: Imported, file: Path) -> None:
    """Print the tables of a log, which of them are taken, and what their columns are taken as."""
    rows = [
        (table.title, str(table.number), table.form, str(len(table.rows)), "yes" if table.chosen else "no")
        for table in imported.tables
    ]
    if not imported.tables:
        say(f"{file}: {len(imported.rows)} whole rows")
        return
    print_table(f"{file}: {len(rows)} tables", ("heading", "table", "form", "rows", "taken"), rows)
    for line in imported.declared:
        say(line)

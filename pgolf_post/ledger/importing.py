"""An older log as ledger rows: rows in = rows out, no cell lost, lineage by base.

Each table row becomes one row whose id is made of the log's name, the table's heading, number and name, so that the
same log imported again is the same rows, and an edited one a mismatch that `--replace` settles. All text stays in
settings (`number`, `base`, `motivation`, `result`, `learning`, and every other column under its own name); what can be
read as a number, a verdict or a date is in its field besides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field as SettingsField

from pgolf_post.base.paths import absent
from pgolf_post.errors import DamagedFileError, NotFoundError, SettingsError
from pgolf_post.ledger.foreign_columns import (
    Field,
    delta_base,
    heading,
    is_blank,
    is_failure,
    normal,
    parse_mapping,
    parse_mark,
    parse_number,
    parse_verdict,
    read_cell,
    recognise,
    summary_of,
)
from pgolf_post.ledger.lineage import EXTERNAL
from pgolf_post.ledger.merging import merge
from pgolf_post.ledger.pages import Record, key_of, read_records
from pgolf_post.ledger.schema import Kind, Row, iso_utc, priced
from pgolf_post.ledger.tables import Table, read_tables, read_text
from pgolf_post.settings import Settings, canonical_json

TEXT_FIELDS: tuple[Field, ...] = ("number", "base", "motivation", "result", "learning")
NUMBERS: tuple[Field, ...] = ("bpb", "delta_bpb", "artifact_bytes", "total_bytes")
KIND_COLUMNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("score", ("eval type", "source checkpoint")),
    ("run", ("run id", "run id / model type")),
)


COMMIT = re.compile(r"(?:commit|git|sha|rev|@)?[ :]*(?=[0-9a-f]*\d)([0-9a-f]{7,40})(?:[+-](?:dirty)?)?")
EXPERIMENT = re.compile(r"(?:exp)?\d+[a-z]*", re.IGNORECASE)
COMMIT_DIGITS = 7  # that a short hash has


class ImportSettings(Settings):
    """Settings of an import: how the columns of a log are read."""

    tables: str = SettingsField("all", description="all, or numbers with commas between them")
    mapping: str = SettingsField("", description="FIELD=COLUMN, with commas between them")
    kind: Kind | None = None
    run: str | None = SettingsField(None, description="name of the log")
    dollars_per_hour: float | None = None


@dataclass(frozen=True)
class Taken(Table):
    """A table, and whether its rows are taken."""

    chosen: bool = True


@dataclass(frozen=True)
class Imported:
    """A log as rows, and what was said about it."""

    rows: list[Row]
    tables: list[Taken]
    declared: list[str] = field(default_factory=list)

    @property
    def rows_in(self) -> int:
        """Rows of the chosen tables; of a .jsonl file, lines."""
        return sum(len(table.rows) for table in self.tables if table.chosen) if self.tables else len(self.rows)

    def facts(self) -> dict[str, Any]:
        """The import as JSON."""
        tables = [
            {"table": t.number, "heading": t.title, "form": t.form, "rows": len(t.rows), "taken": t.chosen}
            for t in self.tables
        ]
        return {"tables": tables, "rows_in": self.rows_in, "rows_out": len(self.rows), "declared": self.declared}


def read_log(path: Path, settings: ImportSettings) -> Imported:
    """A file's chosen tables as rows. Raises NotFoundError, DamagedFileError, SettingsError."""
    if path.suffix.lower() == ".jsonl":
        if settings.model_dump(exclude={"dollars_per_hour"}) != ImportSettings().model_dump(
            exclude={"dollars_per_hour"}
        ):
            raise SettingsError(f"{path} holds whole rows: --table, --map, --kind and --run do nothing for it")
        return Imported([priced(row, settings.dollars_per_hour) for row in _own_rows(path)], [])
    mapping = parse_mapping(settings.mapping)
    records = _records(path, settings)
    tables = read_tables(path, may_lack=bool(records))
    wanted = _chosen_numbers(settings.tables, tables, path)
    taken = [Taken(**{**vars(table), "chosen": table.number in wanted}) for table in tables]
    chosen = [table for table in taken if table.chosen]
    _require_columns(mapping, chosen)
    run = settings.run or path.stem
    drafts, declared = [], []
    for table in chosen:
        columns = recognise(table.header, mapping, table.rows)
        rows = _rows_of(table, columns, run, settings)
        drafts += [(row, table) for row in rows]
        declared += _declare(table, columns, rows)
    merged = merge([row for row, _ in drafts], records, run, settings.kind or "trial")
    drafts = [(row, table) for row, (_, table) in zip(merged.rows, drafts, strict=True)]
    if merged.new:
        beside = _beside(merged.new, len(taken) + 1)
        taken = [*taken, beside]
        drafts += [(row, beside) for row in merged.new]
    declared += merged.declared
    resolved = _with_parents(drafts)
    strangers = Counter(p.removeprefix(EXTERNAL) for r in resolved for p in r.parents if p.startswith(EXTERNAL))
    based = sum(bool(row.parents) for row in resolved)
    outside = f"; not rows of this log: {', '.join(f'{name} ({n})' for name, n in strangers.items())}"
    declared.append(f"{based} of {len(resolved)} rows name a base" + (outside if strangers else ""))
    return Imported(resolved, taken, declared)


def require_rows(imported: Imported, path: Path) -> None:
    """Raise NotFoundError for a log whose chosen tables have columns and no rows, or no lines."""
    if imported.rows:
        return
    columns = [name for table in imported.tables if table.chosen for name in table.header]
    under = f": no row stands under its columns {', '.join(columns)}" if columns else ""
    raise NotFoundError(f"{path} has nothing to import{under}", hint="the first line of a sheet is taken as its header")


def _records(path: Path, settings: ImportSettings) -> list[Record]:
    """Return what a page says beside its tables; nothing of a sheet, or where tables are chosen by number."""
    if path.suffix.lower() in (".csv", ".tsv") or settings.tables.strip() != "all":
        return []
    return read_records(read_text(path))


def _beside(rows: Sequence[Row], number: int) -> Taken:
    """Rows that no table has, as the last table."""
    cells = tuple((row.name,) for row in rows)
    title = "cards, leaderboards and trees"
    return Taken(title, "page", ("name",), cells, ("",) * len(cells), 0, number)


def _chosen_numbers(text: str, tables: Sequence[Table], path: Path) -> set[int]:
    if text.strip() == "all":
        return {table.number for table in tables}
    try:
        wanted = {int(part) for part in text.split(",")}
    except ValueError:
        raise SettingsError(f"--table {text!r}: expected all, or numbers with commas between them") from None
    missing = wanted - {table.number for table in tables}
    if missing:
        raise NotFoundError(
            f"{path} has tables 1 to {len(tables)}, not {', '.join(map(str, sorted(missing)))}",
            hint=f"pgolf-post ledger import {path} --list",
        )
    return wanted


def _require_columns(mapping: Mapping[str, str], tables: Sequence[Table]) -> None:
    """Raise SettingsError for a mapped column that no chosen table has."""
    there = {normal(name): name for table in tables for name in table.header}
    missing = [name for name in mapping.values() if name and normal(name) not in there]
    if missing:
        raise SettingsError(f"--map: no chosen table has {', '.join(missing)}; columns: {', '.join(there.values())}")


# ---- one table -------------------------------------------------------------------------------------------------------


def _rows_of(table: Table, columns: Mapping[Field, str], run: str, settings: ImportSettings) -> list[Row]:
    """The rows of a table, their parents not yet resolved (see `_with_parents`)."""
    kind, now = settings.kind or _kind_of(table), iso_utc()
    seen: Counter[bytes] = Counter()
    rows: list[Row] = []
    for cells, section in zip(table.rows, table.sections, strict=True):
        named = dict(zip(table.header, cells, strict=True))
        text: dict[Field, str] = {key: named[column] for key, column in columns.items() if not is_blank(named[column])}
        identity = canonical_json(["import", run, table.title, text.get("number"), text.get("name")])
        seen[identity] += 1
        row_id = hashlib.sha256(identity + str(seen[identity]).encode()).hexdigest()
        rows.append(
            Row(
                kind,
                row_id,
                name=plain(text.get("name", text.get("number", f"row {len(rows) + 1}"))),
                run=run,
                settings=_settings(table, columns, named, text, section),
                result=_result(text, columns, summary_of(named, text.get("name", ""))),
                commit=plain(text["commit"]) if "commit" in text else None,
                device=text.get("device"),
                seconds=parse_number(text.get("seconds", "")),
                cost_dollars=parse_number(text.get("cost_dollars", "")),
                verdict=parse_verdict(text.get("result", "")) or parse_mark(text.get("result", "")[:1]),
                conclusion=text.get("learning"),
                created=_date(text.get("date", "")) or now,
            )
        )
    return [priced(row, settings.dollars_per_hour) for row in rows]


def _kind_of(table: Table) -> Kind:
    names = {heading(name) for name in table.header}
    return next((kind for kind, signs in KIND_COLUMNS if names & set(signs)), "trial")


def _settings(
    table: Table, columns: Mapping[Field, str], named: Mapping[str, str], text: Mapping[Field, str], section: str
) -> dict[str, Any]:
    """Return every cell's text: that of known fields under their names, that of all others under the columns' own."""
    kept: dict[str, Any] = {"table": table.title, **({"section": section} if section else {})}
    kept |= {key: text[key] for key in TEXT_FIELDS if key in text}
    own = {columns[key] for key in TEXT_FIELDS if key in columns}
    for column, cell in named.items():
        is_name = column == columns.get("name") and cell == plain(cell)
        if column not in own and cell and not is_name:
            kept[column if column not in kept else f"{column} (column)"] = cell
    return kept


def _result(text: Mapping[Field, str], columns: Mapping[Field, str], summary: str | None) -> dict[str, Any]:
    """Return the numbers of a row; of one that sums up others, which are no results, what it is."""
    result: dict[str, Any] = {"summary": summary} if summary else {}
    for key in NUMBERS:
        value = read_cell(key, text[key], columns[key]) if key in text and not summary else None
        if value is not None:
            result[key] = value
    if is_failure(text.get("result", "")):
        result["error"] = text["result"]
    return result


def _date(cell: str) -> str | None:
    matched = re.search(r"\b(\d{4}-\d{2}-\d{2})(?![\d-])", cell)
    return f"{matched[1]}T00:00:00.000+00:00" if matched else None


def plain(cell: str) -> str:
    """A cell without Markdown's emphasis and code marks."""
    return re.sub(r"\*\*|`", "", cell).strip()


def _declare(table: Table, columns: Mapping[Field, str], rows: Sequence[Row]) -> list[str]:
    """Print what each column was taken as, and how much of it could be read as numbers and verdicts."""
    taken = ", ".join(f"{key} ← {column!r}" for key, column in columns.items())
    kept = [column for column in table.header if column not in columns.values()]
    lines = [f"table {table.number}, {table.title!r} ({len(rows)} rows of kind {_kinds(rows)}): {taken}"]
    lines[0] += f"; in settings: {', '.join(map(repr, kept))}" if kept else ""
    for key in NUMBERS:
        cells = [row[table.header.index(columns[key])] for row in table.rows] if key in columns else []
        cells = [cell for cell, row in zip(cells, rows, strict=False) if "summary" not in row.result]
        filled, read = sum(not is_blank(cell) for cell in cells), sum(key in row.result for row in rows)
        if filled > read:
            lines.append(f"table {table.number}: {filled - read} of {filled} cells of {columns[key]!r} stay text")
    if "result" in columns:
        verdicts = Counter(row.verdict for row in rows if row.settings.get("result"))
        said = ", ".join(f"{count} {verdict or 'without verdict'}" for verdict, count in verdicts.items())
        lines.append(f"table {table.number}: verdicts by {columns['result']!r}: {said or 'none'}")
    summaries = [row for row in rows if "summary" in row.result]
    if summaries:
        names = ", ".join(str(row.result["summary"]) for row in summaries)
        lines.append(
            f"table {table.number}: {len(summaries)} rows sum up others, their numbers are no results: {names}"
        )
    sections = len(set(table.sections) - {""})
    lines += [f"table {table.number}: {sections} lines are headings of the rows below them"] if sections else []
    if table.unsplit:
        numbers = ", ".join(table.rows[index][0] for index in table.unsplit)
        lines.append(f"table {table.number}: rows that could not be cut, kept whole as names: {numbers}")
    return lines


def _kinds(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row.kind for row in rows})) or "none"


# ---- lineage ---------------------------------------------------------------------------------------------------------


def _with_parents(drafts: Sequence[tuple[Row, Table]]) -> list[Row]:
    """The rows with their bases as parents: ids of rows of the log where they are, `external:NAME` where not.

    A base is looked for by name, by the first word of a name, then by number; in its own table first, then in the
    others, and there the nearest above before any below.
    """
    keys: dict[str, list[int]] = {}
    for index, (row, _) in enumerate(drafts):
        for key in _keys(row):
            keys.setdefault(key, []).append(index)
    return [replace(row, parents=_parents(index, drafts, keys)) for index, (row, _) in enumerate(drafts)]


def _keys(row: Row) -> list[str]:
    """Return the texts by which another row can name this one as its base."""
    words = re.split(r"[\s(]", row.name, maxsplit=1)
    number = str(row.settings.get("number", ""))
    keys = (normal(row.name), normal(words[0]), _number_key(number), _commit_key(row.commit or ""), key_of(row.name))
    return list(dict.fromkeys(key for key in keys if key))


def _commit_key(text: str) -> str:
    """`54ee870`, `commit 54ee870ab` and a whole hash as one key; empty for what is no commit."""
    return f"commit {_hash(text)[:COMMIT_DIGITS]}" if _hash(text) else ""


def _hash(text: str) -> str:
    """The digits of a commit's hash; empty for what is no commit."""
    matched = COMMIT.fullmatch(normal(plain(text)))
    return matched[1] if matched else ""


def _agree(one: str, other: str) -> bool:
    """Whether two texts do not name different commits: one hash may be longer."""
    return (
        not (_hash(one) and _hash(other)) or _hash(one).startswith(_hash(other)) or _hash(other).startswith(_hash(one))
    )


def _number_key(text: str) -> str:
    """`#7`, `07` and `7` as one key; other numbers (`B4`) as they are."""
    bare = normal(plain(text)).removeprefix("#").strip()
    return f"#{int(bare)}" if bare.isdigit() else bare


def _parents(index: int, drafts: Sequence[tuple[Row, Table]], keys: Mapping[str, list[int]]) -> tuple[str, ...]:
    row, table = drafts[index]
    base = str(row.settings.get("base", ""))
    if not base and "delta_bpb" in row.result:
        base = next((named for name in table.header if (named := delta_base(name))), "")
    whole = _look_up(base, index, drafts, keys)
    if whole is not None:
        return (whole,)
    parts = [part.strip() for part in re.split(r"\s*(?:,|\+|&|\band\b)\s*", _bare(base)) if part.strip()]
    ids = [_look_up(part, index, drafts, keys) for part in parts]
    if len(parts) > 1 and all(ids):
        return tuple(dict.fromkeys(row_id for row_id in ids if row_id))
    return (f"{EXTERNAL}{plain(base)}",) if base else ()


def _bare(base: str) -> str:
    return re.sub(r"\s*\([^)]*\)\s*$", "", plain(base)).strip()


def _look_up(base: str, index: int, drafts: Sequence[tuple[Row, Table]], keys: Mapping[str, list[int]]) -> str | None:
    named = [normal(plain(base)), normal(_bare(base)), _number_key(_bare(base)), _commit_key(_bare(base))]
    named += [key_of(_bare(base))] if EXPERIMENT.fullmatch(_bare(base)) else []
    for key in dict.fromkeys(named):
        places = [place for place in keys.get(key, ()) if place != index] if key else []
        if key == _commit_key(_bare(base)):
            places = [place for place in places if _agree(drafts[place][0].commit or "", _bare(base))]
        if places:
            home = drafts[index][1].number
            nearest = min(places, key=lambda at: (drafts[at][1].number != home, at > index, abs(at - index)))
            return drafts[nearest][0].id
    return None


# ---- our own export --------------------------------------------------------------------------------------------------


def _own_rows(path: Path) -> list[Row]:
    """The rows of `ledger export --format jsonl`. Raises DamagedFileError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(absent(path)) from None
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not UTF-8 text: {error}") from None
    return [_own_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _own_row(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
        return Row(**{**value, "parents": tuple(value["parents"])})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise DamagedFileError(
            f"{where} is no ledger row: {error}", hint="ledger export --format jsonl writes them"
        ) from None

"""The ledger for other programs: every field as CSV, every row whole as JSON lines, the main columns as Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pgolf_post.base.markdown import markdown_cell, markdown_table
from pgolf_post.ledger.query import MISSING, value_of
from pgolf_post.ledger.schema import Row

MAIN_COLUMNS = ("id", "kind", "run", "name", "bpb", "artifact_bytes", "total_bytes", "seconds", "verdict", "conclusion")


def to_jsonl(rows: Sequence[Row]) -> str:
    """One JSON object per row; `ledger import` reads it back to the same rows."""
    return "".join(json.dumps(row.facts(), allow_nan=False) + "\n" for row in rows)


def to_csv(rows: Sequence[Row]) -> str:
    """A line per row and a column per field; `settings.KEY` and `result.KEY` for every key that any row has.

    Texts and numbers stand as they are, nothing as an empty cell, what is nested as JSON.
    """
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for cells in flat for key in cells))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for key, value in row.facts().items():
        if isinstance(value, Mapping):
            cells |= {f"{key}.{inner}": _cell(found) for inner, found in value.items()}
        else:
            cells[key] = " ".join(value) if key == "parents" else _cell(value)
    return cells


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def to_markdown(rows: Sequence[Row]) -> str:
    """A table of the main columns that any row has; pipes and line breaks inside a cell are escaped."""
    told = [{key: value_of(row, key) for key in MAIN_COLUMNS} for row in rows]
    columns = [key for key in MAIN_COLUMNS if any(cells[key] not in (MISSING, None, "") for cells in told)]
    lines = markdown_table(columns, [[markdown_cell(_text(cells[key])) for key in columns] for cells in told])
    return "".join(f"{line}\n" for line in lines) if columns else ""


def _text(value: object) -> str:
    return "" if value is MISSING or value is None else str(value)


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {"csv": to_csv, "jsonl": to_jsonl, "md": to_markdown}

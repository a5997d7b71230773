"""Filters and sorting of `ledger table`, as functions on rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pgolf_post.errors import SettingsError

if TYPE_CHECKING:
    from pgolf_post.ledger.schema import Row

MISSING = object()


def value_of(row: Row, key: str) -> Any:
    """Return a column, else a key of `result`, else of `settings` (dots lead into tables), else MISSING.

    A key that holds a dot itself is looked up whole first.
    """
    if key in vars(row):
        return getattr(row, key)
    for place in (row.result, row.settings, {"result": row.result, "settings": row.settings}):
        value = _dotted(place, key)
        if value is not MISSING:
            return value
    return MISSING


def _dotted(tree: object, key: str) -> object:
    if not isinstance(tree, Mapping):
        return MISSING
    if key in tree:
        return tree[key]
    head, dot, rest = key.partition(".")
    return _dotted(tree[head], rest) if dot and head in tree else MISSING


def matches(row: Row, where: Mapping[str, Any]) -> bool:
    """Return whether every key has the wanted value. Text is compared with numbers and switches as they are written."""
    return all(_equal(value_of(row, key), wanted) for key, wanted in where.items())


def _equal(value: object, wanted: object) -> bool:
    if value is MISSING or not isinstance(wanted, str) or isinstance(value, str):
        return bool(value == wanted)
    if isinstance(value, bool) or value is None:
        return wanted.lower() == {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, int | float):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return str(value) == wanted


def parse_where(conditions: Iterable[str]) -> dict[str, str]:
    """Parse `key=value` texts into a mapping. Raises SettingsError naming one without `=`."""
    wanted = {}
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"--where {condition!r}: expected key=value, for example --where verdict=positive")
        wanted[key.strip()] = value.strip()
    return wanted


def sorted_rows(rows: Sequence[Row], key: str) -> list[Row]:
    """Return rows in ascending order of a key (descending with `-key`); numbers before texts, rows without it last.

    Raises SettingsError if no row has the key.
    """
    name, descending = key.removeprefix("-"), key.startswith("-")
    valued = [(value_of(row, name), row) for row in rows]
    have = [(value, row) for value, row in valued if value is not MISSING and value is not None]
    if rows and not have:
        raise SettingsError(f"--sort {key}: none of the {len(rows)} rows has a {name!r}")
    have.sort(key=lambda pair: _order(pair[0]), reverse=descending)
    return [row for _, row in have] + [row for value, row in valued if value is MISSING or value is None]


def _order(value: Any) -> tuple[int, Any]:
    is_number = isinstance(value, int | float)
    return (0, value) if is_number else (1, str(value))


def counted_bytes(row: Row) -> int | None:
    """Return what a row counts against the budget: total_bytes, else artifact_bytes (+ code_bytes)."""
    result = row.result
    if isinstance(result.get("total_bytes"), int):
        return int(result["total_bytes"])
    if not isinstance(result.get("artifact_bytes"), int):
        return None
    return int(result["artifact_bytes"]) + int(result.get("code_bytes") or 0)


def bpb_of(row: Row) -> float | None:
    """Return a row's bits per byte, or None."""
    bpb = row.result.get("bpb")
    return float(bpb) if isinstance(bpb, int | float) and not isinstance(bpb, bool) else None


def best_rows(rows: Sequence[Row], budget_bytes: int | None) -> list[Row]:
    """Return rows with a bpb, lowest first; with a budget, only those known to count at most that many bytes."""
    scored = [(bpb, row) for row in rows if (bpb := bpb_of(row)) is not None and row.kind not in ("note", "comparison")]
    sizes = {id(row): counted_bytes(row) for _, row in scored}
    if budget_bytes is not None:
        scored = [(b, row) for b, row in scored if (size := sizes[id(row)]) is not None and size <= budget_bytes]
    return [row for _, row in sorted(scored, key=lambda pair: pair[0])]


def text_of(row: Row) -> str:
    """Return the protocol and the text that a row's bpb is of, as far as the row says."""
    protocol = value_of(row, "protocol")
    name = protocol.get("protocol") if isinstance(protocol, Mapping) else protocol
    tokens = row.result.get("tokens")
    return f"{'unknown protocol' if name in (MISSING, None) else name}, {f'{tokens:,}' if tokens else '?'} tokens"


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Return the different texts and protocols of rows, in order of appearance."""
    return list(dict.fromkeys(text_of(row) for row in rows))

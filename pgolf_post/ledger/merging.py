"""Joins what a page says of one experiment, in a table, a card, a leaderboard and a tree, into one row.

A row of a table stays what it is, and gets what it lacks: base, bpb with its protocol, bytes, verdict, learning. An
experiment that no table has becomes a row. What was said stays word by word in settings (`page`), and where two places
give other numbers for one thing the first stands and `disagree` has both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgolf_post.ledger.foreign_columns import is_blank
from pgolf_post.ledger.pages import PROTOCOLS, Record, facts_of, key_of
from pgolf_post.ledger.schema import Kind, Row
from pgolf_post.settings import canonical_json


@dataclass(frozen=True)
class Merged:
    """Rows with what records add to them, rows that records alone make, and what there is to say of it."""

    rows: list[Row]
    new: list[Row]
    declared: list[str]


def merge(rows: Sequence[Row], records: Sequence[Record], run: str, kind: Kind) -> Merged:
    """Return a log's rows and records, joined by the experiment's name."""
    groups = _by_experiment(rows, [record for record in records if record.says])
    first = {key_of(row.name): index for index, row in reversed(list(enumerate(rows)))}
    joined, new = list(rows), list[Row]()
    for key, told in groups.items():
        if key in first:
            joined[first[key]] = _completed(rows[first[key]], told)
        else:
            row_id = hashlib.sha256(canonical_json(["import", run, "page", key])).hexdigest()
            new.append(_completed(Row(kind, row_id, name=told[0].name, run=run, settings={}), told))
    return Merged(joined, new, _declare(records, groups, [*joined, *new], len(new)))


def _by_experiment(rows: Sequence[Row], records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return records by key. `exp92_what-it-is` is the row `exp92` if nothing else in such a place would be."""
    known = {key_of(row.name) for row in rows} | {key_of(record.name) for record in records}
    short = {(one.source, key_of(one.name)): _short(one.name) for one in records}
    crowded = {
        (source, name)
        for (source, key), name in short.items()
        if any(other != (source, key) and short[other] == name and other[0] == source for other in short)
    }
    groups: dict[str, list[Record]] = {}
    for record in records:
        key, name = key_of(record.name), _short(record.name)
        is_row = any(key == key_of(row.name) for row in rows)
        if not is_row and name in known and name != key and (record.source, name) not in crowded:
            key = name
        groups.setdefault(key, []).append(record)
    return groups


def _short(name: str) -> str:
    return key_of(re.split(r"_", name, maxsplit=1)[0])


def _completed(row: Row, records: Sequence[Record]) -> Row:
    """Return a row with what records say and it does not."""
    facts = facts_of(records)
    settings, result = dict(row.settings), dict(row.result)
    for key in ("base", "motivation"):
        if facts[key] and is_blank(str(settings.get(key, ""))):
            settings[key] = facts[key]
    settings["page"] = [f"{record.source}: {record.text}" for record in records]
    fields = [record.fields for record in records if record.fields]
    settings |= {"page_fields": fields} if fields else {}
    settings |= {"disagree": facts["disagree"]} if facts["disagree"] else {}
    result = {**_numbers(facts["bpb"], settings, result), **result}
    if summary := next((record.summary for record in records if record.summary), None):
        result["summary"] = summary
    elif facts["artifact_bytes"] is not None:
        result.setdefault("artifact_bytes", facts["artifact_bytes"])
    return replace(
        row, settings=settings, settings_hash="", result=result,
        verdict=row.verdict or facts["verdict"], conclusion=row.conclusion or facts["learning"],
    )  # fmt: skip


def _numbers(bpb: Mapping[str, float], settings: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return bpb by protocol, and as `bpb` that of the last stage, whose name goes into settings."""
    numbers: dict[str, Any] = {f"bpb_{protocol}": value for protocol, value in bpb.items()}
    last = next((protocol for protocol in PROTOCOLS if protocol in bpb), None)
    if last is not None and "bpb" not in result:
        numbers["bpb"] = bpb[last]
        settings["protocol"] = last
    return numbers


def _declare(records: Sequence[Record], groups: Mapping[str, Any], rows: Sequence[Row], new: int) -> list[str]:
    if not records:
        return []
    counts = {source: sum(one.source == source for one in records) for source in ("card", "leaderboard", "tree")}
    told = (
        f"{counts['card']} cards, {counts['leaderboard']} lines of leaderboards and {counts['tree']} branches of trees"
    )
    with_bpb = sum("bpb" in row.result for row in rows)
    lines = [
        f"{told} say something of {len(groups)} experiments, {new} of them in no table; {with_bpb} rows have a bpb"
    ]
    unclear = sum(record.unclear for record in records)
    if unclear:
        lines.append(f"{unclear} lines of leaderboards have fewer bpb than columns for it: theirs stay text")
    torn = [row for row in rows if "disagree" in row.settings]
    lines += [f"{row.name}: {'; '.join(row.settings['disagree'])} (the first is kept)" for row in torn]
    return lines

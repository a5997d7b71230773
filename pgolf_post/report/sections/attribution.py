"""Attributions: the bits per byte that leaving each group of tensors in float gains, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgolf_post.base.storage import read_json
from pgolf_post.cache import CacheEntry
from pgolf_post.report.blocks import Cell, Figure, Section, Table, number
from pgolf_post.report.sections.intervals import Interval, forest
from pgolf_post.report.subject import Subject

PAYLOAD = "rows.json"  # of a result of stage `attribution`
HEADER = ("left in float", "tensors", "weights", "bytes", "bpb gained", "low", "high", "bpb per 100 KB", "")
SHOWN = 3  # the newest attributions


def attribution(subject: Subject) -> Section | None:
    """Return the section of the newest attributions."""
    newest = subject.results("attribution")[::-1][:SHOWN]
    figures = [_figure(entry) for entry in newest]
    note = "Each group alone is left in float, everything else as decoded; gains need not add up."
    return Section("attribution", "What quantization costs, by group", [*figures], note) if figures else None


def _figure(entry: CacheEntry) -> Figure:
    payload = read_json(entry.path / PAYLOAD)
    control, rows = payload["control"], payload["rows"]
    plan = entry.config.get("plan")
    name = f"{entry.checkpoint.parent.name}, {entry.path.name[:6]}, by {entry.config.get('by', 'group')}"
    name += f", plan {plan['name']}" if isinstance(plan, Mapping) and "name" in plan else ""
    points = [Interval(row["group"], row["gain_bpb"], row["low_bpb"], row["high_bpb"]) for row in rows]
    table = Table(f"Attribution of {name}", HEADER, [_cells(row) for row in rows])
    alone = [row for row in rows if row["group"] != "all"] or rows
    most = max(alone, key=lambda row: float(row["gain_bpb"]))
    summary = (
        f"Quantized: {control['bpb']:.5f} bpb in {control['artifact_bytes']:,} bytes. {most['group']} gains most, "
        f"{most['gain_bpb']:+.5f} bpb for {most['group_bytes']:,} bytes."
    )
    return forest(f"Bits per byte gained: {name}", summary, points, "bpb gained by leaving it in float", table)


def _cells(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    counts = (number(row[key]) for key in ("tensors", "weights", "group_bytes"))
    bounds = (number(row[key], "+.5f") for key in ("gain_bpb", "low_bpb", "high_bpb", "gain_per_100kb"))
    return Cell(row["group"]), *counts, *bounds, Cell("NO-OP" if row["no_op"] else "")

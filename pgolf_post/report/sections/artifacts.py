"""Artifacts: bytes against bits per byte, the front that none beats in both, and the budget."""

from __future__ import annotations

from typing import Any

from pgolf_post.ledger import Row
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, cut, lines, number
from pgolf_post.report.points import Point, main_text
from pgolf_post.report.sections.ranges import near_axis
from pgolf_post.report.subject import Subject

HEADER = ("artifact", "run or sweep", "bytes", "headroom", "bpb", "gap to its weights, bpb", "scored on", "id")
NOT_NAMED = ("view", "codec", "data_manifest_sha256", "rules")  # settings that say little in a label
FAR = 3.0  # the budget line is drawn if it lies within so many widths of the points


def artifacts(subject: Subject) -> Section | None:
    """Return the section of the artifacts and packed trials."""
    points = subject.points
    if not points:
        return None
    table = Table("All artifacts", HEADER, [_cells(point, subject) for point in points])
    scored = [point for point in points if point.bpb is not None]
    blocks: list[Block] = [_figure(scored, subject, table)] if len(scored) > 1 else [table]
    return Section("artifacts", "Artifacts", blocks, "The gap is against the weights that were quantized, same text.")


def settings_of(row: Row) -> list[str]:
    """Return the settings by which a row is told from others, as `key = value`."""
    changes = row.settings.get("changes") if row.kind == "trial" else row.settings
    flat = changes if isinstance(changes, dict) else {}
    return [
        f"{key} = {value}"
        for key, value in flat.items()
        if key not in NOT_NAMED and value not in (None, "", [], {}) and not isinstance(value, list | dict)
    ]


def _cells(point: Point, subject: Subject) -> tuple[Cell, ...]:
    row = point.row
    return (
        Cell(row.name or row.id[:12]),
        Cell(row.run),
        number(point.num_bytes),
        number(subject.budget_bytes - point.num_bytes, "+,"),
        number(point.bpb, ".5f"),
        number(point.gap_bpb, "+.5f") if row.kind == "artifact" else Cell(""),
        Cell(point.text),
        Cell(row.id[:12]),
    )


def front(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the points that no other beats in both bytes and bpb, by bytes."""
    best: list[tuple[int, float]] = []
    for size, bpb in sorted(points):
        if not best or bpb < best[-1][1]:
            best.append((size, bpb))
    return best


def _figure(points: list[Point], subject: Subject, table: Table) -> Figure:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.text_id, []).append(point)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": lines([cut(own[0].text or "recorded in the ledger", 48)]),
            "x": [point.num_bytes for point in own],
            "y": [point.bpb for point in own],
            "text": [_hover(point) for point in own],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"size": 9},
        }
        for own in groups.values()
    ]
    largest = main_text(points)
    best = front([(point.num_bytes, float(point.bpb or 0.0)) for point in largest])
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "front",
            "x": [size for size, _ in best],
            "y": [bpb for _, bpb in best],
            "line": {"shape": "hv", "width": 1.5},
            "hoverinfo": "skip",
        }
    )
    sizes = [point.num_bytes for point in points]
    shown, beyond = near_axis([float(point.bpb or 0.0) for point in points])
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "counted bytes"}, "tickformat": ",d", "nticks": 6},
        "yaxis": {"title": {"text": "bits per byte"}, **shown},
    }
    budget, width = subject.budget_bytes, max(max(sizes) - min(sizes), 1)
    if min(sizes) - FAR * width <= budget <= max(sizes) + FAR * width:
        line = {"type": "line", "x0": budget, "x1": budget, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [{**line, "line": {"color": "#c0392b", "dash": "dash", "width": 1.5}}]
        where = f"The budget of {budget:,} bytes is the dashed line."
    else:
        side = "left" if budget < min(sizes) else "right"
        where = f"The budget of {budget:,} bytes lies far to the {side}."
    fits = [point for point in largest if point.num_bytes <= budget]
    lowest = min(fits or largest, key=lambda point: float(point.bpb or 0.0))
    summary = (
        f"{len(points)} scores of artifacts; numbers compare within a colour. On {largest[0].text or 'the main text'} "
        f"{'the lowest within the budget' if fits else 'none is within the budget; the lowest'} is "
        f"{lowest.row.name or lowest.row.id[:12]} with {lowest.bpb:.5f} bpb in {lowest.num_bytes:,} bytes. "
        f"{where}{beyond}"
    )
    return Figure("Bytes against bits per byte", summary, traces, layout, table, 460)


def _hover(point: Point) -> str:
    row = point.row
    gap = [f"gap {point.gap_bpb:+.5f} bpb"] if point.gap_bpb is not None and row.kind == "artifact" else []
    numbers = [f"{point.num_bytes:,} bytes, {point.bpb:.5f} bpb", *gap]
    return lines([row.name or row.id[:12], *numbers, *settings_of(row)[:12]])

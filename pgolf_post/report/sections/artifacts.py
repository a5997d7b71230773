"""Artifacts: bytes against bits per byte, the front that none beats in both, and the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pgolf_post.ledger import Row
from pgolf_post.ledger.lineage import Node, trees
from pgolf_post.ledger.query import bpb_of, counted_bytes
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, cut, lines, number
from pgolf_post.report.sections.ranges import near_axis
from pgolf_post.report.subject import Subject

HEADER = ("artifact", "run or sweep", "bytes", "headroom", "bpb", "gap to its weights, bpb", "scored on", "id")
NOT_NAMED = ("view", "codec", "data_manifest_sha256", "rules")  # settings that say little in a label
FAR = 3.0  # the budget line is drawn if it lies within so many widths of the points


@dataclass(frozen=True)
class Point:
    """An artifact's bytes with one score."""

    row: Row  # of the artifact or trial
    num_bytes: int
    bpb: float | None
    gap_bpb: float | None
    text: str  # protocol and text of the score, in words; empty if there is none
    text_id: str = ""  # the same for scores that compare


def artifacts(subject: Subject) -> Section | None:
    """Return the section of the artifacts and packed trials."""
    points = points_of(subject.rows)
    if not points:
        return None
    table = Table("All artifacts", HEADER, [_cells(point, subject) for point in points])
    scored = [point for point in points if point.bpb is not None]
    blocks: list[Block] = [_figure(scored, subject, table)] if len(scored) > 1 else [table]
    return Section("artifacts", "Artifacts", blocks, "The gap is against the weights that were quantized, same text.")


def points_of(rows: list[Row]) -> list[Point]:
    """Return every artifact and packed trial with each of its scores, the fewest bits per byte first."""
    points = []
    trials = {str(row.result.get("artifact_id")) for row in rows if row.kind == "trial"}
    for root in trees(rows):
        for _, node in root.walk():
            row = node.row
            if row is None or row.kind not in ("artifact", "trial") or "artifact_bytes" not in row.result:
                continue
            if row.kind == "artifact" and row.id in trials:
                continue  # its trial says more
            points += _of_node(row, node)
    return sorted(points, key=lambda point: (point.bpb is None, point.bpb or 0.0, point.num_bytes))


def _of_node(row: Row, node: Node) -> list[Point]:
    num_bytes = counted_bytes(row) or 0
    if row.kind == "trial":
        told = f"sweep {row.run}" if bpb_of(row) is not None else ""
        return [Point(row, num_bytes, bpb_of(row), _trial_gap(row), told, told)]
    scores = [(child.row, child) for child in node.children if child.row is not None and child.row.kind == "score"]
    found = [
        Point(row, num_bytes, bpb_of(score), child.delta_bpb, _text_of(score), score.settings_hash)
        for score, child in scores
    ]
    return found or [Point(row, num_bytes, bpb_of(row), node.delta_bpb, "")]


def _text_of(score: Row) -> str:
    """Return a score's protocol and text in words."""
    tokens = score.result.get("tokens")
    return f"{score.name.removesuffix(' of an artifact')}, {tokens:,} tokens" if tokens else score.name


def main_text(points: list[Point]) -> list[Point]:
    """Return the scored points of the text and protocol that most were scored on: they compare with each other."""
    by_text: dict[str, list[Point]] = {}
    for point in points:
        if point.bpb is not None:
            by_text.setdefault(point.text_id, []).append(point)
    return max(by_text.values(), key=len, default=[])


def _trial_gap(row: Row) -> float | None:
    parts = (
        part for part in row.result.values() if isinstance(part, dict) and part.get("bpb") == row.result.get("bpb")
    )
    return next((part.get("difference_bpb") for part in parts), None)


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

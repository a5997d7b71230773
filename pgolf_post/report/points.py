"""Artifacts as points: bytes, and bits per byte by each score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgolf_post.ledger import Row
from pgolf_post.ledger.lineage import Node
from pgolf_post.ledger.query import bpb_of, counted_bytes


@dataclass(frozen=True)
class Point:
    """An artifact's bytes with one score."""

    row: Row  # of the artifact or trial
    num_bytes: int
    bpb: float | None
    gap_bpb: float | None
    text: str  # protocol and text of the score, in words; empty if there is none
    text_id: str = ""  # the same for scores that compare


def points_of(rows: Sequence[Row], roots: Sequence[Node]) -> list[Point]:
    """Return every artifact and packed trial with each of its scores, the fewest bits per byte first.

    `roots` are the trees of the rows.
    """
    points = []
    trials = {str(row.result.get("artifact_id")) for row in rows if row.kind == "trial"}
    for root in roots:
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


def main_text(points: Sequence[Point]) -> list[Point]:
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

"""Bins of an artifact's score against those of its weights: what quantizing changed, and where."""

from __future__ import annotations

from collections.abc import Iterator

from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row
from pgolf_post.report.blocks import Cell, Figure, Section, Table, number
from pgolf_post.report.sections.breakdowns import name_of
from pgolf_post.report.sections.intervals import Interval, forest
from pgolf_post.report.subject import Subject
from pgolf_post.score.bpb import Score
from pgolf_post.score.breakdown.difference import BinDifference, ScoreSums, bin_differences
from pgolf_post.score.breakdown.sums import FILE, Breakdown
from pgolf_post.score.cached import SCORE

KINDS_SHOWN = ("token-class", "sentence", "repeat", "frequency")  # bins that both scores fill with the same tokens
SHOWN = 2  # artifacts: those with the fewest bits per byte
HEADER = ("kind of bin", "bin", "tokens", "Δ bpb", "low", "high", "nats per token", "of the weights")


def changes(subject: Subject) -> Section | None:
    """Return the section of the best artifacts whose score and whose weights' score both have a breakdown."""
    figures: list[Figure] = []
    for artifact, weights in _pairs(subject):
        if len(figures) < SHOWN and (figure := _figure(subject, artifact, weights)) is not None:
            figures.append(figure)
    note = "Each bin's part of the gap, paired by document; the bins of one kind add up to the gap."
    return Section("changes", "What quantization changed", [*figures], note) if figures else None


def _pairs(subject: Subject) -> Iterator[tuple[Row, Row]]:
    """Yield scores of artifacts, the best first, each with the score of its weights on the same text."""
    scores = sorted(subject.of_kind("score"), key=lambda row: float(row.result.get("bpb", 0.0)))
    parents = {row.id: row.parents for row in subject.of_kind("artifact")}
    of_weights = {(parent, row.settings_hash): row for row in scores for parent in row.parents}
    for row in scores:
        above = [view for parent in row.parents for view in parents.get(parent, ())]
        found = [of_weights[view, row.settings_hash] for view in above if (view, row.settings_hash) in of_weights]
        if found:
            yield row, found[0]


def _sums(subject: Subject, row: Row) -> ScoreSums | None:
    entry = subject.entries.get(row.id)
    if entry is None or not (entry.path / FILE).is_file():
        return None
    try:
        return ScoreSums(Score.load(entry.path / SCORE.payload), Breakdown.load(entry.path / FILE))
    except PgolfError:
        return None  # a damaged one is noticed, and made again, by the command that reads it


def _figure(subject: Subject, artifact: Row, weights: Row) -> Figure | None:
    mine, theirs = _sums(subject, artifact), _sums(subject, weights)
    if mine is None or theirs is None:
        return None
    found = [(kind, one) for kind in KINDS_SHOWN for one in bin_differences(mine, theirs, kind)]
    points = [Interval(f"{kind}: {one.name}", one.bpb, one.low, one.high, _hover(one)) for kind, one in found]
    name = name_of(artifact, {row.id: row.name for row in subject.rows})
    table = Table(f"Bins of {name} against its weights", HEADER, [_cells(kind, one) for kind, one in found])
    gap = mine.score.bpb - theirs.score.bpb
    classes = [one for kind, one in found if kind == "token-class"]
    most = max(classes, key=lambda one: one.bpb)
    summary = f"{name}: {gap:+.5f} bpb against its weights, of which {most.name} makes {most.bpb:+.5f}."
    return forest(f"The gap of {name} by bin", summary, points, "part of the gap, bpb", table)


def _hover(one: BinDifference) -> tuple[str, ...]:
    return f"{one.tokens:,} tokens", f"nats per token {one.control_nats / one.control_tokens:.4f} before"


def _cells(kind: str, one: BinDifference) -> tuple[Cell, ...]:
    numbers = (number(value, "+.6f") for value in (one.bpb, one.low, one.high))
    per_token = number(one.nats / one.tokens, ".4f"), number(one.control_nats / one.control_tokens, ".4f")
    return Cell(kind), Cell(one.name), number(one.tokens), *numbers, *per_token

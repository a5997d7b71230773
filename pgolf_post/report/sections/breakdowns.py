"""Breakdowns: nats per token by bin for the scores that have them, and how well confidence fits accuracy."""

from __future__ import annotations

from typing import Any

from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, cut, label, number
from pgolf_post.report.subject import Subject
from pgolf_post.score.breakdown.kinds import KINDS
from pgolf_post.score.breakdown.sums import FILE, BinSums, Breakdown

SHOWN = 4  # scores: those with the fewest bits per byte
CONFUSIONS = 40
HEADER = ("score", "bin", "tokens", "nats", "nats per token", "top 1", "top 5", "confidence")
Named = list[tuple[str, Breakdown]]


def breakdowns(subject: Subject) -> Section | None:
    """Return the section of the best scores that were made with a breakdown."""
    named = _named(subject)
    if not named:
        return None
    blocks: list[Block] = [_bars(kind, named) for kind in KINDS if kind not in ("calibration", "confusions")]
    blocks += [_reliability(named), *(_confusions(*one) for one in named[:1])]
    return Section("breakdowns", "Where the bits are", blocks, "The bins of one kind add up to the score.")


def _named(subject: Subject) -> Named:
    names = {row.id: row.name for row in subject.rows}
    scores = sorted(subject.of_kind("score"), key=lambda row: float(row.result.get("bpb", 0.0)))
    found: Named = []
    for row in scores:
        entry = subject.entries.get(row.id)
        if entry is None or not (entry.path / FILE).is_file() or len(found) == SHOWN:
            continue
        try:
            found.append((name_of(row, names), Breakdown.load(entry.path / FILE)))
        except PgolfError:
            continue  # a damaged one is noticed, and made again, by the command that reads it
    return found


def name_of(row: Row, names: dict[str, str]) -> str:
    """Return a score in words: what was scored, and by which protocol."""
    parent = next((names[parent] for parent in row.parents if names.get(parent)), row.id[:12])
    return f"{cut(parent, 44)}, {row.name.partition(' of ')[0]}"


def _bars(kind: str, named: Named) -> Figure:
    order = list(dict.fromkeys(name for _, one in named for name in one.kinds[kind].names))
    held = {one.name for _, own in named for one in own.kinds[kind].of_bins()}
    order = [name for name in order if name in held]
    traces: list[dict[str, Any]] = []
    rows: list[tuple[Cell, ...]] = []
    for name, own in named:
        bins = own.kinds[kind].of_bins()
        traces.append(
            {
                "type": "bar",
                "name": label(name),
                "x": [label(one.name) for one in bins],
                "y": [one.nats_per_token for one in bins],
                "text": [f"{one.tokens:,} tokens, top 1 {one.top1 / one.tokens:.1%}" for one in bins],
                "textposition": "none",
                "hovertemplate": "%{x}<br>%{y:.4f} nats per token<br>%{text}<extra></extra>",
            }
        )
        rows += [_cells(name, one) for one in bins]
    title = KINDS[kind].title
    layout = {
        "barmode": "group",
        "xaxis": {"type": "category", "categoryorder": "array", "categoryarray": [label(one) for one in order]},
        "yaxis": {"title": {"text": "nats per token"}},
    }
    bins = named[0][1].kinds[kind].of_bins()
    most = max(bins, key=lambda one: one.nats)
    share = most.nats / sum(one.nats for one in bins)
    summary = (
        f"{named[0][0]}: most bits, {share:.0%}, are in {most.name} with {most.nats_per_token:.3f} nats per token."
    )
    return Figure(f"Nats per token by {title}", summary, traces, layout, Table(f"By {title}", HEADER, rows), 400)


def _cells(name: str, one: BinSums) -> tuple[Cell, ...]:
    shares = (number(100 * value / one.tokens, ".1f", " %") for value in (one.top1, one.top5, one.confidence))
    return (
        Cell(name),
        Cell(one.name),
        number(one.tokens),
        number(one.nats, ",.1f"),
        number(one.nats_per_token, ".4f"),
        *shares,
    )


def _reliability(named: Named) -> Figure:
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "exact", "x": [0, 1], "y": [0, 1], "line": {"dash": "dot"}}
    ]
    rows: list[tuple[Cell, ...]] = []
    for name, own in named:
        bins = own.kinds["calibration"].of_bins()
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label(name),
                "x": [one.confidence / one.tokens for one in bins],
                "y": [one.top1 / one.tokens for one in bins],
                "text": [f"{one.name}: {one.tokens:,} tokens" for one in bins],
                "hovertemplate": "%{text}<br>confidence %{x:.1%}, right %{y:.1%}<extra></extra>",
            }
        )
        rows += [_cells(name, one) for one in bins]
    layout = {
        "xaxis": {"title": {"text": "mean probability of the most likely token"}, "range": [0, 1]},
        "yaxis": {"title": {"text": "share of tokens that it is right"}, "range": [0, 1]},
    }
    name, own = named[0]
    summary = (
        f"{name}: top 1 {own.top1_accuracy:.1%}, top 5 {own.top5_accuracy:.1%}, expected calibration error "
        f"{100 * own.calibration_error:.2f} points."
    )
    return Figure("Reliability", summary, traces, layout, Table("By confidence", HEADER, rows), 420)


def _confusions(name: str, own: Breakdown) -> Table:
    bins = [one for one in own.kinds["confusions"].of_bins() if one.name not in ("right", "all other pairs")]
    header = ("most likely, for the actual one", "times", "nats", "nats each")
    rows = [
        (Cell(one.name), number(one.tokens), number(one.nats, ",.1f"), number(one.nats_per_token, ".3f"))
        for one in bins[:CONFUSIONS]
    ]
    return Table(f"Confusions that cost most: {name}", header, rows)

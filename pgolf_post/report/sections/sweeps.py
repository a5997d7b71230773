"""Sweeps: each trial's paired difference from the control with its interval, ranked, and the table of all of them."""

from __future__ import annotations

from typing import Any

from pgolf_post.ledger import Row
from pgolf_post.ledger.query import bpb_of, counted_bytes
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, number
from pgolf_post.report.sections.artifacts import settings_of
from pgolf_post.report.sections.intervals import Interval, forest
from pgolf_post.report.subject import Subject

HEADER = ("trial", "role", "bytes", "bpb", "Δ control", "low", "high", "verdict", "seconds", "note")
DRAWN = 60  # trials in a figure: the best; the table has all


def sweeps(subject: Subject) -> Section | None:
    """Return the section of the sweeps, the newest first."""
    by_sweep: dict[str, list[Row]] = {}
    for row in subject.of_kind("trial"):
        by_sweep.setdefault(row.run, []).append(row)
    newest_first = sorted(by_sweep.items(), key=lambda pair: pair[1][-1].created, reverse=True)
    blocks: list[Block] = [_block(name, rows) for name, rows in newest_first]
    note = "Differences are paired with the control's score of the same text. The grey band is the rounding noise."
    return Section("sweeps", "Sweeps", blocks, note) if blocks else None


def deciding(row: Row) -> dict[str, Any]:
    """Return the part of a trial's result that its bits per byte are of; empty if it was not scored."""
    bpb = row.result.get("bpb")
    parts = [part for part in row.result.values() if isinstance(part, dict) and "bpb" in part]
    same = [part for part in parts if part["bpb"] == bpb]
    return dict(same[-1]) if same else {}


def _rank(row: Row) -> tuple[int, float]:
    score = deciding(row)
    if not score:
        return 1, 0.0
    return 0, float(score.get("difference_bpb", 0.0))


def _block(name: str, rows: list[Row]) -> Figure | Table:
    ranked = sorted((row for row in rows if row.settings.get("role") != "noise"), key=_rank)
    ranked += [row for row in rows if row.settings.get("role") == "noise"]
    question = next((str(row.settings["question"]) for row in rows if row.settings.get("question")), name)
    table = Table(f"Trials of {name}", HEADER, [_cells(row) for row in ranked])
    points = [_interval(row) for row in ranked if "difference_bpb" in deciding(row)]
    if not points:
        return table
    floors = [row.result["noise_floor_bpb"] for row in rows if isinstance(row.result.get("noise_floor_bpb"), float)]
    best = points[0]
    sure = "its interval excludes zero" if best.high is not None and best.high < 0 else "its interval includes zero"
    more = f" The figure has the best {DRAWN} of {len(points)}." if len(points) > DRAWN else ""
    summary = f"{question} Best: {best.name} with {best.value:+.5f} bpb against the control; {sure}.{more}"
    axis = "Δ bpb from the control"
    return forest(f"{name}: {question}", summary, points[:DRAWN], axis, table, max(floors, default=None))


def _interval(row: Row) -> Interval:
    score, num_bytes = deciding(row), counted_bytes(row)
    told = ([] if num_bytes is None else [f"{num_bytes:,} bytes"]) + settings_of(row)[:8]
    return Interval(row.name, score["difference_bpb"], score.get("low_bpb"), score.get("high_bpb"), tuple(told))


def _cells(row: Row) -> tuple[Cell, ...]:
    score = deciding(row)
    note = next((f"{key}: {row.result[key]}" for key in ("error", "dropped", "stopped") if key in row.result), "")
    return (
        Cell(row.name),
        Cell(str(row.settings.get("role", ""))),
        number(counted_bytes(row)),
        number(bpb_of(row), ".5f"),
        *(number(score.get(key), "+.5f") for key in ("difference_bpb", "low_bpb", "high_bpb")),
        Cell(row.verdict or ""),
        number(row.seconds, ",.1f"),
        Cell(note or row.conclusion or ""),
    )

"""Checkpoints, averages and other blends: bits per byte of each set of weights, by step."""

from __future__ import annotations

from typing import Any

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, label, number
from pgolf_post.report.sections.ranges import near_axis
from pgolf_post.report.subject import Subject

HEADER = ("checkpoint", "kind", "weights", "step", "bpb", "tokens scored", "parents", "id")


def checkpoints(subject: Subject) -> Section | None:
    """Return the section of the checkpoint folders."""
    points = [(one, name, view) for one in subject.checkpoints for name, view in one.meta["views"].items()]
    if not points:
        return None
    rows = [_row(*point) for point in points]
    table = Table("Sets of weights", HEADER, rows)
    measured = [point for point in points if (point[2].get("metric") or {}).get("bpb") is not None]
    blocks: list[Block] = [_figure(measured, table)] if len(measured) > 1 else [table]
    return Section("checkpoints", "Checkpoints and blends", blocks, "Bits per byte as recorded when each was saved.")


def _name(one: Checkpoint) -> str:
    return f"{one.path.parent.name}/{one.path.name}"


def _row(one: Checkpoint, name: str, view: dict[str, Any]) -> tuple[Cell, ...]:
    metric = view.get("metric") or {}
    parents = one.meta.get("parents") or ()
    return (
        Cell(_name(one)),
        Cell(str(one.meta["kind"])),
        Cell(name),
        number(int(one.meta["step"])),
        number(metric.get("bpb"), ".5f"),
        number(metric.get("tokens")),
        number(len(parents)) if parents else Cell(""),
        Cell(str(view["id"])[:12]),
    )


def _figure(points: list[tuple[Checkpoint, str, dict[str, Any]]], table: Table) -> Figure:
    series: dict[str, list[tuple[int, float, str]]] = {}
    for one, name, view in points:
        kind = str(one.meta["kind"])
        group = f"{one.path.parent.name}, {name}" if kind in ("raw", "imported") else f"{kind} {name}"
        series.setdefault(group, []).append((int(one.meta["step"]), float(view["metric"]["bpb"]), _name(one)))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(values) > 1 else "markers",
            "name": label(group),
            "x": [step for step, _, _ in values],
            "y": [bpb for _, bpb, _ in values],
            "text": [f"{label(name)}<br>step {step:,}, {bpb:.5f} bpb" for step, bpb, name in values],
            "hovertemplate": "%{text}<extra></extra>",
        }
        for group, own in series.items()
        for values in [sorted(own)]
    ]
    shown, beyond = near_axis([float(point[2]["metric"]["bpb"]) for point in points])
    lowest = min(points, key=lambda point: float(point[2]["metric"]["bpb"]))
    summary = (
        f"{len(points)} sets of weights; the lowest is {_name(lowest[0])} ({lowest[1]}) with "
        f"{float(lowest[2]['metric']['bpb']):.5f} bpb.{beyond}"
    )
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "bits per byte"}, **shown}}
    return Figure("Bits per byte by step", summary, traces, layout, table)

"""Diagnoses: the numbers that a rule of thumb marks, then what each block adds, and the weights by tensor and step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from pgolf_post.diagnose.numbers import METRICS
from pgolf_post.diagnose.report import BLOCK_HEADER, COLUMNS, block_rows, text_of, where
from pgolf_post.diagnose.rules import Mark
from pgolf_post.diagnose.series import series
from pgolf_post.diagnose.stage import DIAGNOSIS, Diagnosis, open_diagnosis
from pgolf_post.errors import PgolfError
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, label, number
from pgolf_post.report.subject import Subject

MARK_HEADER = ("rule", "what", "measured", "limit", "where", "what to do", "whose experience")
SHOWN = 2  # runs: those diagnosed last
BY_STEP = ("effective_rank_share", "condition", "kurtosis", "removal_divergence")


def diagnostics(subject: Subject) -> Section | None:
    """Return the section of the diagnoses: of each run its last checkpoint, then all of them by step."""
    by_run: dict[str, list[tuple[str, Diagnosis]]] = {}  # run → its diagnoses, each with the view it is of
    for entry in subject.results(DIAGNOSIS.name):
        try:
            found = str(entry.config.get("view", "")), open_diagnosis(entry.path)
        except PgolfError:
            continue  # a damaged one is noticed, and made again, by the command that reads it
        by_run.setdefault(entry.checkpoint.parent.name, []).append(found)
    blocks: list[Block] = []
    for run, own in list(by_run.items())[::-1][:SHOWN]:
        last = max((one for _, one in own), key=lambda one: one.step)
        view, _ = Counter(view for view, _ in own).most_common(1)[0]  # curves are of one view
        by_step = {one.step: one for name, one in own if name == view}
        blocks += [*_blocks(f"{run}, step {last.step:,}", last), *_over_steps(run, list(by_step.values()))]
    note = "A marked number is a question, not a verdict: each rule names its source."
    return Section("diagnostics", "Diagnostics", blocks, note) if blocks else None


def _blocks(name: str, found: Diagnosis) -> list[Block]:
    marked = Table(f"Marked in {name}", MARK_HEADER, [_mark(mark) for mark in found.marks])
    told = "" if found.marks else f"No rule of thumb marks any of the {len(found.numbers):,} numbers of {name}."
    first: list[Block] = [marked] if found.marks else [Table(f"Marked in {name}", MARK_HEADER, [], told)]
    visits = _visits(name, found)
    return [*first, *([visits] if visits else []), _weights(name, found)]


def _mark(mark: Mark) -> tuple[Cell, ...]:
    rule, own = mark.rule, mark.number
    limit = Cell(f"{'>' if rule.bad == 'above' else '<'} {rule.limit:g}", rule.limit)
    measured = Cell(text_of(own.value), own.value)
    return Cell(rule.name), Cell(own.subject), measured, limit, Cell(where(own)), Cell(rule.advice), Cell(rule.source)


def _visits(name: str, found: Diagnosis) -> Figure | None:
    """Return what attention and MLP add at each visit, with the table of all numbers by visit; None if not measured."""
    shares: dict[str, list[tuple[str, float]]] = {"attention_share": [], "mlp_share": []}
    for one in found.numbers:
        if one.metric in shares and one.value is not None:
            shares[one.metric].append((one.subject, one.value))
    if not any(shares.values()):
        return None
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "name": {"attention_share": "attention", "mlp_share": "MLP"}[metric],
            "x": [label(place) for place, _ in values],
            "y": [value for _, value in values],
            "hovertemplate": "%{x}<br>‖Δx‖/‖x‖ %{y:.1%}<extra></extra>",
        }
        for metric, values in shares.items()
    ]
    rows = [tuple(_cell(text) for text in row) for row in block_rows(found.numbers)]
    layout = {
        "barmode": "group",
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": "‖Δx‖/‖x‖"}, "tickformat": ".0%"},
    }
    every = [(value, place) for values in shares.values() for place, value in values]
    summary = f"{name}: the least is added at {min(every)[1]} ({min(every)[0]:.1%} of the residual's norm)."
    return Figure(f"What each visit adds, {name}", summary, traces, layout, Table("By visit", BLOCK_HEADER, rows), 360)


def _over_steps(run: str, found: list[Diagnosis]) -> Iterator[Figure]:
    """Yield a figure for each of BY_STEP that several checkpoints of a run have."""
    curves = series(found, "role")
    for metric in BY_STEP:
        own = {curve.name.removeprefix(f"{metric} "): curve for curve in curves if curve.name.startswith(f"{metric} ")}
        own = {group: curve for group, curve in own.items() if len(curve) > 1}
        if not own:
            continue
        words = METRICS[metric].words
        traces: list[dict[str, Any]] = [
            {"type": "scatter", "mode": "lines+markers", "name": label(group), "x": curve.step, "y": curve.values}
            for group, curve in own.items()
        ]
        steps = sorted({step for curve in own.values() for step in curve.step.tolist()})
        values = {
            group: dict(zip(curve.step.tolist(), curve.values.tolist(), strict=True)) for group, curve in own.items()
        }
        rows = [(Cell(group), *(number(at.get(step), ".4g") for step in steps)) for group, at in values.items()]
        moved = max(own, key=lambda group: float(np.ptp(own[group].values)))
        first, last = own[moved].values[0], own[moved].values[-1]
        summary = f"{words}, the worst of each role: {moved} moved most, from {first:.4g} to {last:.4g}."
        scale = {"type": "log", "dtick": 1} if metric == "condition" else {}
        layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {**scale, "title": {"text": metric.replace("_", " ")}}}
        title = f"{metric.replace('_', ' ')} of {run} by step"
        yield Figure(title, summary, traces, layout, Table(title, ("", *(f"{step:,.0f}" for step in steps)), rows), 360)


def _cell(text: str) -> Cell:
    """Return a cell that is sorted as a number where it shows one."""
    try:
        return Cell(text, float(text.replace(",", "").removesuffix("%")))
    except ValueError:
        return Cell(text)


def _weights(name: str, found: Diagnosis) -> Table:
    by_tensor: dict[str, dict[str, float | None]] = {}
    for one in found.numbers:
        if one.part == "weights":
            by_tensor.setdefault(one.subject, {})[one.metric] = one.value
    header = ("tensor", *(column.heading for column in COLUMNS))
    rows = [
        (Cell(tensor), *(number(values.get(column.metric), column.form) for column in COLUMNS))
        for tensor, values in by_tensor.items()
    ]
    return Table(f"Weights of {name}", header, rows)

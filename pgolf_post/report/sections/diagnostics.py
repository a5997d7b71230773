"""Diagnoses: the numbers that a rule of thumb marks, then what each block adds, and the weights by tensor."""

from __future__ import annotations

from typing import Any

from pgolf_post.diagnose.report import BLOCK_HEADER, COLUMNS, block_rows, text_of, where
from pgolf_post.diagnose.rules import Mark
from pgolf_post.diagnose.stage import DIAGNOSIS, Diagnosis, open_diagnosis
from pgolf_post.errors import PgolfError
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, label, number
from pgolf_post.report.subject import Subject

MARK_HEADER = ("rule", "what", "measured", "limit", "where", "what to do", "whose experience")
SHOWN = 2  # the newest diagnoses


def diagnostics(subject: Subject) -> Section | None:
    """Return the section of the newest diagnoses, what is marked first."""
    blocks: list[Block] = []
    for entry in subject.results(DIAGNOSIS.name)[::-1][:SHOWN]:
        try:
            found = open_diagnosis(entry.path)
        except PgolfError:
            continue  # a damaged one is noticed, and made again, by the command that reads it
        blocks += _blocks(f"{entry.checkpoint.parent.name}, step {found.step:,}", found)
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

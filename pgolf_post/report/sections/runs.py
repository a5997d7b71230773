"""Training runs: the loss by step with the moments at which checkpoints were saved, and where the seconds went."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.storage import read_json
from pgolf_post.curves.curve import Log
from pgolf_post.curves.reading import read_log
from pgolf_post.curves.smoothing import smooth
from pgolf_post.errors import PgolfError
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, label, number
from pgolf_post.report.subject import Subject

PHASE_TIMES_FILE = "ledger.json"  # of the trainer, in a run's folder
LOSS = "train_loss"
COLUMNS = (
    (LOSS, "loss, nats", ".4f"),
    ("lr_multiplier", "learning rate ×", ".3f"),
    ("grad_norm", "gradient norm", ".3f"),
    ("tokens_per_second", "tokens per second", ",.0f"),
)
POINTS = 600  # of a curve: more steps are averaged in as many equal groups
ROWS = 40  # of a curve's table
SKIPPED_PHASES = ("periodic", "interrupted")


def runs(subject: Subject) -> Section | None:
    """Return the section of the runs that left a log: all losses over each other, then each run."""
    logs = {folder: log for folder in subject.run_folders if (log := _log(folder)) is not None}
    blocks: list[Block] = [_together(list(logs.values()))] if len(logs) > 1 else []
    for folder in subject.run_folders:
        blocks += _blocks(folder, logs.get(folder))
    note = "A dotted line for each moment at which a checkpoint was saved. Points are means over equal groups of steps."
    return Section("runs", "Training", blocks, note) if blocks else None


def _log(folder: Path) -> Log | None:
    """Return a run's log with its losses by step; None where it left none that can be read."""
    try:
        log = read_log(folder)
        return log if len(log.curve(LOSS).along("step")) > 1 else None
    except PgolfError:
        return None


def _blocks(folder: Path, log: Log | None) -> Iterator[Block]:
    if log is not None:
        yield _curve(folder.name, log)
    seconds = _phase_seconds(folder)
    if seconds:
        yield _seconds(folder.name, seconds)


def thinned(values: np.ndarray, points: int = POINTS) -> np.ndarray:  # (n,) → (≤ points,)
    """Return means over equal groups of neighbours."""
    groups = np.array_split(values, min(points, len(values)))
    return np.array([group.mean() for group in groups])


def _line(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    hover = "%{fullData.name}<br>step %{x:,.0f}: %{y:.4f}<extra></extra>"
    return {"type": "scatter", "mode": "lines", "name": label(name), "x": x, "y": y, "hovertemplate": hover}


def _together(logs: list[Log]) -> Figure:
    """Return the losses of several runs over each other, each smoothed over a fiftieth of its steps."""
    traces, rows, ends = [], [], []
    for log in logs:
        curve = log.curve(LOSS)
        step = curve.along("step")
        window = float(step[-1] - step[0]) / 50
        values = smooth(curve, "step", window).values
        traces.append(_line(log.name, thinned(step), thinned(values)))
        ends.append((float(values[-1]), log.name))
        rows.append(
            (Cell(log.name), number(float(step[-1]), ",.0f"), number(window, ",.0f"), number(ends[-1][0], ".4f"))
        )
    every = np.concatenate([trace["y"] for trace in traces])
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss, nats per token"}, "range": _range(every)},
    }
    lowest = min(ends)
    summary = f"{len(logs)} runs, smoothed over a fiftieth of their steps; {lowest[1]} ends lowest, at {lowest[0]:.4f}."
    table = Table("Losses at the end", ("run", "steps", "smoothed over, steps", "loss at the end, nats"), rows)
    return Figure("Losses of all runs", summary, traces, layout, table)


def _curve(run: str, log: Log) -> Figure:
    curve = log.curve(LOSS)
    step, loss = curve.along("step"), curve.values
    thin = thinned(loss)
    traces = [_line("training loss", thinned(step), thin), *_measured(log)]
    marks = [(place, phase) for phase, place in (log.phases or {}).items() if phase not in SKIPPED_PHASES]
    low, high = float(thin.min()), float(thin.max())
    traces += [_mark(place, phase, low, high) for place, phase in marks]
    placed = {"yref": "paper", "y": 1, "yanchor": "top", "xanchor": "right", "textangle": -90, "showarrow": False}
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "nats per token"}, "range": _range(thin)},
        "annotations": [{"x": place, "text": label(phase), **placed} for place, phase in marks],
    }
    last = float(loss[-20:].mean())
    summary = (
        f"Loss from {loss[0]:.3f} at step {step[0]:,.0f} to {last:.3f} nats per token (mean of the last 20 steps) at "
        f"step {step[-1]:,.0f}."
    )
    return Figure(f"Loss of {run}", summary, traces, layout, _table(run, log))


def _measured(log: Log) -> Iterator[dict[str, Any]]:
    """Yield what checkpoints measured on validation text, in the same unit."""
    for name, curve in log.curves.items():
        if name.startswith("val_loss") and curve.has("step"):
            view = name.removeprefix("val_loss").removeprefix("_") or "raw"
            line = _line(f"validation, {view}", curve.along("step"), curve.values)
            yield {**line, "mode": "lines+markers" if len(curve) > 1 else "markers"}


def _mark(place: float, phase: str, low: float, high: float) -> dict[str, Any]:
    line = {"dash": "dot", "width": 1, "color": "#888888"}
    text = [f"step {place:,.0f}: {label(phase)}"] * 2
    drawn = {"mode": "lines", "line": line, "showlegend": False, "hovertemplate": "%{text}<extra></extra>"}
    return {"type": "scatter", "x": [place, place], "y": [low, high], "text": text, "name": label(phase), **drawn}


def _table(run: str, log: Log) -> Table:
    """Return some of a run's steps with what its log says of each."""
    curves = [(heading, log.curves[name], form) for name, heading, form in COLUMNS if name in log.curves]
    step = log.curve(LOSS).along("step")
    places = step[np.unique(np.linspace(0, len(step) - 1, min(ROWS, len(step))).astype(int))]
    found = [(dict(zip(curve.step.tolist(), curve.values.tolist(), strict=True)), form) for _, curve, form in curves]
    rows = [
        (number(place, ",.0f"), *(number(values.get(place), form) for values, form in found))
        for place in places.tolist()
    ]
    return Table(f"Loss of {run}", ("step", *(heading for heading, _, _ in curves)), rows)


def _range(values: np.ndarray) -> list[float]:
    """Return the axis that the later part of a curve needs: the first steps fall from far above."""
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    margin = 0.06 * (high - low) or 0.1
    return [low - margin, high + margin]


def _phase_seconds(folder: Path) -> dict[str, float]:
    """Return a run's seconds by phase; empty where it left none that can be read."""
    try:
        facts = read_json(folder / PHASE_TIMES_FILE)
    except PgolfError:
        return {}
    phases = facts.get("phases", {})
    seconds = {str(name): float(phase["seconds"]) for name, phase in phases.items()}
    seconds["other"] = float(facts.get("other_seconds", 0.0))
    return {name: value for name, value in seconds.items() if value > 0}


def _seconds(run: str, seconds: dict[str, float]) -> Figure:
    total = math.fsum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda pair: pair[1])
    names = [label(name.replace("_", " ")) for name, _ in ordered]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [value for _, value in ordered],
            "y": names,
            "text": [f"{value:,.1f} s, {100 * value / total:.1f} %" for _, value in ordered],
            "hovertemplate": "%{y}: %{text}<extra></extra>",
        }
    ]
    rows = [
        (Cell(name.replace("_", " ")), number(value, ",.1f"), number(100 * value / total, ".1f", " %"))
        for name, value in reversed(ordered)
    ]
    layout = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"automargin": True}}
    name, value = ordered[-1]
    summary = f"{total:,.1f} s in all, most of them ({100 * value / total:.0f} %) in {name.replace('_', ' ')}."
    table = Table(f"Seconds of {run}", ("phase", "seconds", "share"), rows)
    return Figure(f"Where the time of {run} went", summary, traces, layout, table, 130 + 34 * len(names))

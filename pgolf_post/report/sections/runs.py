"""Training runs: the loss by step with the moments at which checkpoints were saved, and where the seconds went."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.storage import read_json
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.errors import PgolfError
from pgolf_post.report.blocks import Block, Cell, Figure, Section, Table, label, number
from pgolf_post.report.subject import Subject

LOG_FILE, PHASE_TIMES_FILE = "train.jsonl", "ledger.json"  # of the trainer, in a run's folder
POINTS = 600  # of a curve: more steps are averaged in as many equal groups
ROWS = 40  # of a curve's table
SKIPPED_PHASES = ("periodic", "interrupted")


def runs(subject: Subject) -> Section | None:
    """Return the section of the runs that left a log."""
    blocks = [block for folder in subject.run_folders for block in _blocks(folder, subject)]
    note = "A line for each moment at which a checkpoint was saved. Points are means over equal groups of steps."
    return Section("runs", "Training", blocks, note) if blocks else None


def _blocks(folder: Path, subject: Subject) -> Iterator[Block]:
    log = read_log(folder / LOG_FILE)
    if len(log) > 1:
        yield _curve(folder.name, log, [one for one in subject.checkpoints if one.path.parent == folder])
    seconds = _phase_seconds(folder)
    if seconds:
        yield _seconds(folder.name, seconds)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the steps of a run's log; lines that a kill cut off are passed over, a repeated step counts once."""
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if math.isfinite(record["loss"]):
                steps[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    return [steps[step] for step in sorted(steps)]


def thinned(values: np.ndarray, points: int = POINTS) -> np.ndarray:  # (n,) → (≤ points,)
    """Return means over equal groups of neighbours."""
    groups = np.array_split(values, min(points, len(values)))
    return np.array([group.mean() for group in groups])


def _curve(run: str, log: list[dict[str, Any]], saved: list[Checkpoint]) -> Figure:
    step, loss = (np.array([float(record[key]) for record in log]) for key in ("step", "loss"))
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "training loss, nats", "x": thinned(step), "y": thinned(loss)}
    ]
    marks = [(int(one.meta["step"]), str(one.meta["phase"])) for one in saved if one.meta["kind"] == "raw"]
    marks = [mark for mark in dict.fromkeys(marks) if mark[1] not in SKIPPED_PHASES]
    low, high = float(thinned(loss).min()), float(thinned(loss).max())
    for place, phase in marks:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [place, place],
                "y": [low, high],
                "line": {"dash": "dot", "width": 1, "color": "#888888"},
                "name": label(phase),
                "showlegend": False,
                "hovertemplate": "%{text}<extra></extra>",
                "text": [f"step {place:,}: {label(phase)}"] * 2,
            }
        )
    placed = {"yref": "paper", "y": 1, "yanchor": "top", "xanchor": "right", "textangle": -90, "showarrow": False}
    notes = [{"x": place, "text": label(phase), **placed} for place, phase in marks]
    rows = [
        (*(number(record[key], form) for key, form in TABLE_KEYS), number(record.get("tokens_per_second"), ",.0f"))
        for record in _some(log, ROWS)
    ]
    header = ("step", "loss, nats", "learning rate ×", "training seconds", "tokens per second")
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss, nats per token"}, "range": _range(thinned(loss))},
        "annotations": notes,
    }
    last = float(loss[-20:].mean())
    summary = (
        f"Loss from {loss[0]:.3f} at step {step[0]:,.0f} to {last:.3f} nats per token (mean of the last 20 steps) at "
        f"step {step[-1]:,.0f}."
    )
    return Figure(f"Loss of {run}", summary, traces, layout, Table(f"Loss of {run}", header, rows))


TABLE_KEYS = (("step", ","), ("loss", ".4f"), ("lr_multiplier", ".3f"), ("train_seconds", ",.1f"))


def _some(log: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    places = np.unique(np.linspace(0, len(log) - 1, min(count, len(log))).astype(int))
    return [log[place] for place in places]


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

"""The curves of a run of ours: every step from train.jsonl, and what its checkpoints record of validation text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.curves.curve import Point
from pgolf_post.curves.gathering import Gathering
from pgolf_post.errors import PgolfError

LOG_FILE = "train.jsonl"
CURVES = {"loss": "train_loss"}  # other keys keep their names
LEFT_OUT = ("step", "tokens_seen", "train_seconds", "wall_seconds", "mean_tokens_per_second")
VIEW_SUFFIX = {"raw": ""}  # of the others: _ema, _swa


def gather_own(text: str) -> tuple[Gathering, int]:  # and the number of lines that are no record
    """Return the points of a train.jsonl's text; a kill leaves at most one torn line, which is counted."""
    gathering = Gathering()
    lines = [line for line in text.split("\n") if line.strip()]
    records = [record for record in map(_record, lines) if record is not None]
    tokens_per_step = _tokens_per_step(records)
    for record in records:
        step = float(record["step"])
        tokens = float(record.get("tokens_seen", step * tokens_per_step))  # a run with stages says it
        place = {"step": step, "tokens": tokens, "seconds": record.get("train_seconds")}
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in LEFT_OUT:
                gathering.add(CURVES.get(key, key), Point(float(value), **place))
    return gathering, len(lines) - len(records)


def is_own(text: str) -> bool:
    """Whether a text's first whole line is a record of a step."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    record = _record(first)
    return record is not None and "loss" in record


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _tokens_per_step(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the tokens of a step from the mean rate, which is rounded: the last record tells it best."""
    for record in reversed(records):
        seconds, rate = record.get("train_seconds"), record.get("mean_tokens_per_second")
        if record["step"] and seconds and rate:
            return float(round(rate * seconds / record["step"]))
    return math.nan


def saved_metrics(run: Path) -> Iterator[tuple[str, Point]]:
    """Yield (curve, point) of what the checkpoints of a run's folder measured on validation text."""
    for meta in _metas(run):
        place = {"step": float(meta["step"]), "seconds": meta.get("train_seconds"), "tokens": meta.get("tokens_seen")}
        for view, facts in meta["views"].items():
            metric, suffix = facts.get("metric") or {}, VIEW_SUFFIX.get(view, f"_{view}")
            if "bpb" in metric:
                yield f"val_bpb{suffix}", Point(float(metric["bpb"]), **place)
            if metric.get("tokens"):
                yield f"val_loss{suffix}", Point(float(metric["nats"]) / float(metric["tokens"]), **place)


def phase_steps(run: Path) -> dict[str, float]:
    """Return the step of every phase that the checkpoints of a run's folder name."""
    return {str(meta["phase"]): float(meta["step"]) for meta in _metas(run)}


def _metas(run: Path) -> list[dict[str, Any]]:
    return sorted(
        _readable(run.glob("step_*/meta.json")),
        key=lambda meta: (int(meta["step"]), float(meta.get("created_unix", 0))),
    )


def _readable(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            yield Checkpoint.open(path.parent).meta
        except PgolfError:
            continue  # `checkpoint list` and `verify` speak of damage; its log stands

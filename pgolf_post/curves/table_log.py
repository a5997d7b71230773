"""The curves in a table (CSV, TSV): one column of steps, and every other column of numbers a curve."""

from __future__ import annotations

import csv
import io

from pgolf_post.curves.curve import Axis, Point
from pgolf_post.curves.gathering import Gathering

AXIS_NAMES: dict[str, tuple[Axis, float]] = {  # heading → axis, and what its numbers are multiplied by
    **dict.fromkeys(("step", "steps", "iter", "iteration", "_step", "global_step"), ("step", 1.0)),
    **dict.fromkeys(("tokens", "tokens_seen", "num_tokens"), ("tokens", 1.0)),
    **dict.fromkeys(("seconds", "train_seconds", "time_s", "elapsed", "train_time_s"), ("seconds", 1.0)),
    **dict.fromkeys(("train_time_ms", "time_ms", "train_time"), ("seconds", 0.001)),
}
CURVE_NAMES = {"loss": "train_loss", "train/loss": "train_loss", "val/loss": "val_loss", "bpb": "val_bpb"}


def gather_table(text: str) -> Gathering | None:
    """Return the points of a table's text; None if its first line names no column of steps."""
    header, *rows = _cells(text) or [[]]
    names = [name.strip().lower() for name in header]
    axes = {column: AXIS_NAMES[name] for column, name in enumerate(names) if name in AXIS_NAMES}
    if not any(axis == "step" for axis, _ in axes.values()):
        return None
    gathering = Gathering()
    for row in rows:
        numbers = [_number(cell) for cell in row]
        place = {
            axis: numbers[column] * factor  # type: ignore[operator]
            for column, (axis, factor) in axes.items()
            if column < len(numbers) and numbers[column] is not None
        }
        for column, value in enumerate(numbers):
            if column < len(names) and column not in axes and value is not None and "step" in place:
                gathering.add(CURVE_NAMES.get(names[column], names[column]), Point(value, **place))
    return gathering


def _cells(text: str) -> list[list[str]]:
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    return [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(map(str.strip, row))]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None

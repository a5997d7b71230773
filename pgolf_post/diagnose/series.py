"""Diagnoses of several checkpoints as curves over steps: the worst value of each group at every checkpoint."""

from __future__ import annotations

from collections.abc import Container, Sequence

from pgolf_post.curves.curve import Curve, Point
from pgolf_post.diagnose.numbers import METRICS, Number
from pgolf_post.diagnose.report import COLUMNS, By, group_of, text_of, worst_of
from pgolf_post.diagnose.stage import Diagnosis

WORST = {column.metric: column.worst for column in COLUMNS}
BLOCKS = ("norm_after", "attention_share", "mlp_share", "removal_divergence", "dead_units", "value")


def series(diagnoses: Sequence[Diagnosis], by: By) -> list[Curve]:
    """Return one curve over steps for each metric and group, named `METRIC GROUP`.

    Weights are grouped, with their worst value; numbers of blocks and single learned scalars stand for themselves. A
    value that is not finite leaves a gap.
    """
    points: dict[str, list[Point]] = {}
    looped = {n.layer for one in diagnoses for n in one.numbers if n.visit is not None and n.visit > 1}
    for diagnosis in sorted(diagnoses, key=lambda one: one.step):
        for name, value in _values(diagnosis.numbers, by, looped).items():
            if value is not None:
                points.setdefault(name, []).append(Point(value, step=diagnosis.step))
    return [Curve.of(name, found) for name, found in points.items()]


def _values(numbers: Sequence[Number], by: By, looped: Container[int | None]) -> dict[str, float | None]:
    grouped: dict[tuple[str, str], list[float | None]] = {}
    for number in numbers:
        if number.metric in WORST:
            grouped.setdefault((number.metric, group_of(number, by)), []).append(number.value)
        elif number.metric in BLOCKS:
            grouped.setdefault((number.metric, _subject(number, looped)), []).append(number.value)
    return {f"{metric} {group}": worst_of(v, WORST.get(metric, "largest")) for (metric, group), v in grouped.items()}


def _subject(number: Number, looped: Container[int | None]) -> str:
    """Return a subject that stays the same when loops are switched on: a block that is looped later has a visit 1."""
    if number.visit == 1 and number.layer in looped and "visit" not in number.subject:
        return number.subject.replace(f"block {number.layer}", f"block {number.layer}, visit 1")
    return number.subject


def series_rows(curves: Sequence[Curve], steps: Sequence[int]) -> list[tuple[str, ...]]:
    """Return one row of cells for each curve that changes: its name, and its value at every step."""
    rows = []
    for curve in curves:
        at = dict(zip(curve.step.tolist(), curve.values.tolist(), strict=True))
        if not curve.name.startswith("value ") and len(set(at.values())) > 1:
            rows.append((curve.name, *(text_of(at[step]) if step in at else "" for step in steps)))
    return rows


def panels(curves: Sequence[Curve]) -> dict[str, list[tuple[str, Curve]]]:
    """Return the curves by metric, for a picture: heading → (label, curve)."""
    found: dict[str, list[tuple[str, Curve]]] = {}
    for curve in curves:
        metric, _, group = curve.name.partition(" ")
        if metric != "value" and len(curve) > 1:
            unit = METRICS[metric].unit
            heading = metric.replace("_", " ") + (f" ({unit})" if unit else "")
            found.setdefault(heading, []).append((group, curve))
    return found

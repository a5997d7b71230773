"""Tables of curves for people: what each log holds, and where two runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pgolf_post.curves.comparing import Difference
from pgolf_post.curves.curve import Log

LOG_HEADER = ("log", "form", "curve", "points", "first", "last", "last value")


def log_rows(logs: Sequence[Log]) -> list[tuple[str, ...]]:
    """Return one row of cells under LOG_HEADER for each curve of each log."""
    return [
        (log.name, log.form, name, f"{len(curve):,}", f"{curve.step[0]:g}", f"{curve.step[-1]:g}", f"{last:.4f}")
        for log in logs
        for name, curve in log.curves.items()
        for last in [float(curve.values[-1])]
    ]


def difference_header(control: str, by: str) -> tuple[str, ...]:
    """Return the heading of a table of differences."""
    return ("run", by, control, "it", "difference", "± (1 σ)", "points", "window")


def difference_rows(differences: Mapping[str, Sequence[Difference]]) -> list[tuple[str, ...]]:
    """Return one row of cells for each run and point."""
    return [(run, *_cells(difference)) for run, found in differences.items() for difference in found]


def _cells(one: Difference) -> tuple[str, ...]:
    error = "unknown" if one.error is None else f"{one.error:.4f}"
    points = f"{one.points}{' paired' if one.paired else ''}"
    values = f"{one.control:.4f}", f"{one.other:.4f}", f"{one.difference:+.4f}"
    return f"{one.at:,g}", *values, error, points, f"{one.window:,.4g}"

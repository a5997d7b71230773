"""The difference of two curves at chosen points, with its noise.

A training loss is noisy and falls. Around each point a straight line is fitted to what lies within a window, and its
value there is compared, so that a slope or an uneven spacing makes no difference. The noise is the standard error of
that value from the residuals. Where both runs report the same places in the window, the line is fitted to their
difference: two runs that read the same batches share most of their noise, and it cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pgolf_post.curves.curve import Axis, Curve, Log
from pgolf_post.errors import MismatchError, SettingsError

SHARE = 50  # a window is at least the common range divided by this, unless one is asked for
LEAST_FOR_ERROR = 3  # points from which a line has residuals
PREFERRED = ("train_loss", "val_loss", "val_bpb")


@dataclass(frozen=True)
class Smoothed:
    """A curve's value at a point."""

    value: float
    error: float | None  # standard error; None where fewer than LEAST_FOR_ERROR points are in the window
    points: int


@dataclass(frozen=True)
class Difference:
    """Two curves at a point: the other's value minus the control's."""

    at: float
    control: float
    other: float
    difference: float
    error: float | None  # standard error; None where a window has too few points
    points: int  # of the sparser curve in the window
    paired: bool  # whether the runs report the same places
    window: float  # the wider of both curves'

    def facts(self) -> dict[str, Any]:
        """Return the difference as JSON."""
        return asdict(self)


def common_curve(logs: Sequence[Log], wanted: str | None = None) -> str:
    """Return the name of the curve to compare. Raises MismatchError if the logs have none in common."""
    shared = [name for name in logs[0].curves if all(name in log.curves for log in logs)]
    if wanted is not None:
        for log in logs:
            log.curve(wanted)
        return wanted
    if not shared:
        each = "; ".join(f"{log.path} has {', '.join(log.curves)}" for log in logs)
        raise MismatchError(f"the logs have no curve in common: {each}", hint="one log alone: pgolf-post curves LOG")
    return next((name for name in PREFERRED if name in shared), shared[0])


def common_range(curves: Sequence[Curve], by: Axis) -> tuple[float, float]:
    """Return the range of places that all curves reach. Raises MismatchError if they have none in common."""
    places = [curve.along(by) for curve in curves]
    low, high = max(float(x[0]) for x in places), min(float(x[-1]) for x in places)
    if low >= high and any(len(x) > 1 for x in places):
        ranges = "; ".join(f"{x[0]:,g} … {x[-1]:,g}" for x in places)
        raise MismatchError(f"the curves have no {by} in common: {ranges}", hint="compare by another axis: --by tokens")
    return low, high


def default_window(curves: Sequence[Curve], by: Axis) -> float:
    """Return the window by which curves are smoothed in a picture: at least two spacings of the sparser one."""
    low, high = common_range(curves, by)
    spacings = [float(np.median(np.diff(curve.along(by)))) for curve in curves if len(curve) > 1]
    return max([(high - low) / SHARE, *(2.0 * spacing for spacing in spacings)])


def default_points(curves: Sequence[Curve], by: Axis, count: int = 5) -> list[float]:
    """Return evenly spaced points of the common range, the last one its end; whole numbers on whole axes."""
    low, high = common_range(curves, by)
    points = [low + (high - low) * (i + 1) / count for i in range(count)]
    return points if by == "seconds" else [float(round(point)) for point in points]


def compare_curves(
    control: Curve,
    other: Curve,
    by: Axis,
    at: Sequence[float],
    window: float | None = None,  # in units of the axis; None: at each point as wide as each curve needs it
    trailing: bool = False,  # of the other curve, the window ends at the point instead of being centred on it
) -> list[Difference]:
    """Return the differences at the asked points.

    Raises MismatchError for a point that not both curves reach, SettingsError for a window that is not positive.
    """
    if window is not None and window <= 0:
        raise SettingsError(f"--window {window:g}: it must be positive")
    low, high = common_range([control, other], by)
    outside = [point for point in at if not low <= point <= high]
    if outside:
        named = ", ".join(f"{point:,g}" for point in outside)
        raise MismatchError(f"--at {named}: both curves reach {low:,g} … {high:,g} {by}", hint=f"--at {high:g}")
    least = (high - low) / SHARE
    return [_difference(control, other, by, point, window, least, trailing) for point in at]


def _difference(
    control: Curve, other: Curve, by: Axis, at: float, window: float | None, least: float, trailing: bool
) -> Difference:
    x, y = control.along(by), other.along(by)
    first = window or local_window(x, at, least, trailing=False)
    second = window or local_window(y, at, least, trailing)
    a, b = smoothed(x, control.values, at, first), smoothed(y, other.values, at, second, trailing)
    widest = max(first, second)
    shared = _shared(control, other, by, at, widest, trailing)
    if shared is not None:
        paired = smoothed(*shared, at, widest, trailing)
        return Difference(at, a.value, b.value, paired.value, paired.error, paired.points, True, widest)
    error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
    points = min(a.points, b.points)
    return Difference(at, a.value, b.value, b.value - a.value, error, points, False, widest)


def local_window(places: np.ndarray, at: float, least: float, trailing: bool) -> float:
    """Return a window that holds LEAST_FOR_ERROR points around a place, or before it; `least` if that is wider."""
    before = places[places <= at] if trailing else places
    distances = np.sort(np.abs(before - at))
    reach = float(distances[min(LEAST_FOR_ERROR, len(distances)) - 1]) * (1 + 1e-9)
    return max(least, reach if trailing else 2.0 * reach)


def _shared(
    control: Curve, other: Curve, by: Axis, at: float, window: float, trailing: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return places and differences if both curves report the same places in the window, and enough of them."""
    parts = []
    for curve in (control, other):
        inside = _inside(curve.along(by), at, window, trailing)
        parts.append((curve.along(by)[inside], curve.values[inside]))
    (x, a), (y, b) = parts
    if len(x) < LEAST_FOR_ERROR or not np.array_equal(x, y):
        return None
    return x, b - a


def smoothed(
    places: np.ndarray,  # (n,) ascending
    values: np.ndarray,  # (n,)
    at: float,
    window: float,
    trailing: bool = False,
) -> Smoothed:
    """Return the value at a point of the line through what lies in the window.

    With fewer than LEAST_FOR_ERROR points there, or with all of them on one side, the nearest points on both sides are
    joined by a straight line: a line that is fitted is never carried on past its points, but for a trailing window.
    """
    inside = _inside(places, at, window, trailing)
    count = int(inside.sum())
    one_sided = count > 0 and not (trailing or places[inside][0] <= at <= places[inside][-1])
    if count < LEAST_FOR_ERROR or one_sided:
        return Smoothed(float(np.interp(at, places, values)), None, count)
    x, y = places[inside] - at, values[inside]
    design = np.stack([np.ones(count), x / window], axis=1)  # (count, 2)
    inverse = np.linalg.pinv(design.T @ design)
    line = inverse @ design.T @ y
    residual = y - design @ line
    variance = float(residual @ residual) / (count - 2)
    return Smoothed(float(line[0]), math.sqrt(max(0.0, variance * float(inverse[0, 0]))), count)


def _inside(places: np.ndarray, at: float, window: float, trailing: bool) -> np.ndarray:
    low, high = (at - window, at) if trailing else (at - window / 2, at + window / 2)
    inside: np.ndarray = (places >= low) & (places <= high)
    return inside

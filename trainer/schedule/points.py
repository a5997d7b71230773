"""A curve over a run as points of progress and multiplier: cycles, ramps, staircases, any paper's shape.

Between two points the multiplier is linear, before the first and after the last it is constant. Two points of one
progress are a jump: the second holds from there on, which makes warm restarts (Loshchilov & Hutter 2017,
arXiv:1608.03983) and staircases.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field

Share = Annotated[float, Field(ge=0, le=1)]
LARGEST_RATE = 1e6  # of a learning rate or a factor of it: products of all of them are float32 numbers
Multiplier = Annotated[float, Field(ge=0, le=LARGEST_RATE)]


def multiplier_along(points: tuple[tuple[float, float], ...], at: float) -> float:
    """Return the multiplier at progress `at`, in [0, 1], of points in order of progress."""
    after = bisect_right(points, at, key=lambda point: point[0])
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (start, low), (end, high) = points[after - 1], points[after]
    return low + (high - low) * (at - start) / (end - start)


def _in_order(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Refuse points out of order, and one that no step can see."""
    shares = [share for share, _ in points]
    for number, (before, share) in enumerate(pairwise(shares), start=2):
        if share < before:
            raise ValueError(
                f"points out of order: point {number} is at progress {share:g}, point {number - 1} at {before:g}; "
                "list them by rising progress"
            )
        if share == before and (share in (0, 1) or shares.count(share) > 2):
            raise ValueError(
                f"point {number} is at progress {share:g} as point {number - 1} is; a jump is two points at most, "
                "between 0 and 1"
            )
    return points


Points = Annotated[tuple[tuple[Share, Multiplier], ...], AfterValidator(_in_order)]

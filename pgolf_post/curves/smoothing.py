"""A curve as it is drawn: each point replaced by the mean of those in a window around it."""

from __future__ import annotations

import numpy as np

from pgolf_post.curves.curve import Axis, Curve


def smooth(curve: Curve, by: Axis, window: float) -> Curve:
    """Return the curve with each value the mean of those within half a window on both sides; places stay.

    At the ends the window shrinks to what lies evenly on both sides, so that a falling curve is not bent.
    """
    places = curve.along(by)
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    reach = np.minimum(window / 2, np.minimum(places - places[0], places[-1] - places))
    low = np.searchsorted(places, places - reach, side="left")
    high = np.searchsorted(places, places + reach, side="right")
    return Curve(curve.name, (sums[high] - sums[low]) / (high - low), curve.step, curve.tokens, curve.seconds)

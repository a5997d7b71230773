"""Axes that show what matters where a few values lie far away; the table has all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FAR = 6.0  # a value is far if it is this many times further from the lowest than three quarters of the values are
SHOWN = 3.0  # how far the axis goes then, in the same unit
MARGIN = 0.06


def near_axis(values: Sequence[float]) -> tuple[dict[str, list[float]], str]:
    """Return an axis' `range`, empty where all values fit, and a sentence on how many lie beyond it."""
    low, quarters, high = (float(np.quantile(values, share)) for share in (0.0, 0.75, 1.0))
    width = quarters - low
    if width <= 0 or high <= low + FAR * width:
        return {}, ""
    top = low + SHOWN * width
    beyond = sum(value > top for value in values)
    shown = [low - MARGIN * SHOWN * width, top + MARGIN * SHOWN * width]
    return {"range": shown}, f" {beyond} lie above the figure; double-click it to see all."

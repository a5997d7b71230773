"""Forest plots: a line for each thing, its estimate as a point and its interval as a bar, zero as a line."""

from __future__ import annotations

from typing import Any, NamedTuple

from pgolf_post.report.blocks import Figure, Table, cut, label, lines

ROW_PIXELS, FRAME_PIXELS = 24, 120


class Interval(NamedTuple):
    """An estimate with its bounds; None where nothing is known of them."""

    name: str
    value: float
    low: float | None
    high: float | None
    hover: tuple[str, ...] = ()  # further lines of its label


def forest(
    title: str,
    summary: str,
    points: list[Interval],
    axis: str,
    table: Table,
    band: float | None = None,  # half-width about zero inside which nothing is a difference
) -> Figure:
    """Return the forest plot of intervals, the first on top."""
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [point.value for point in points],
        "y": list(range(len(points))),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0.0 if point.high is None else point.high - point.value for point in points],
            "arrayminus": [0.0 if point.low is None else point.value - point.low for point in points],
            "thickness": 1.5,
        },
        "marker": {"size": 8},
        "text": [_hover(point) for point in points],
        "hovertemplate": "%{text}<extra></extra>",
    }
    shapes: list[dict[str, Any]] = [
        {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1, "dash": "dot"}}
    ]
    if band:
        grey = {"fillcolor": "rgba(128,128,128,0.18)", "line": {"width": 0}, "layer": "below"}
        shapes.append({"type": "rect", "x0": -band, "x1": band, "y0": 0, "y1": 1, "yref": "paper", **grey})
    layout = {
        "xaxis": {"title": {"text": axis}, "nticks": 6},
        "yaxis": {
            "tickvals": list(range(len(points))),
            "ticktext": [label(cut(point.name, 34)) for point in points],
            "range": [len(points) - 0.4, -0.6],
            "automargin": True,
            "zeroline": False,
        },
        "shapes": shapes,
        "showlegend": False,
    }
    return Figure(title, summary, [trace], layout, table, FRAME_PIXELS + ROW_PIXELS * len(points))


def _hover(point: Interval) -> str:
    known = point.low is not None and point.high is not None
    interval = f" [{point.low:+.5f} … {point.high:+.5f}]" if known else ""
    return lines([point.name, f"{point.value:+.5f}{interval}", *point.hover])

"""Curves as a picture: one panel for each quantity, one line for each run or group.

Drawn with matplotlib (extra `plots`), without a display: the file's ending decides between svg, png and pdf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import atomic_file
from pgolf_post.curves.curve import Axis, Curve
from pgolf_post.pack.report.picture import UNDATED, require_plots

Panels = Mapping[str, Sequence[tuple[str, Curve]]]  # heading → (label, curve)
COLUMNS = 2
MOST_LABELS = 12
AXIS_NAMES = {"step": "optimizer steps", "tokens": "training tokens", "seconds": "training seconds"}


def draw_curves(panels: Panels, by: Axis, path: Path, marks: Sequence[float] = ()) -> None:
    """Write a picture of panels of curves, in one rename; `marks` are places with a vertical line.

    Raises SettingsError for an ending that cannot be drawn, NotFoundError without matplotlib.
    """
    require_plots(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (heading, lines) in zip(axes, panels.items(), strict=False):
        _draw(axis, heading, lines, by, marks)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    with rc_context({"svg.hashsalt": "pgolf-post", "svg.fonttype": "none"}), atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130, metadata=UNDATED[path.suffix])


def _draw(axis: Any, heading: str, lines: Sequence[tuple[str, Curve]], by: Axis, marks: Sequence[float]) -> None:
    for label, curve in lines:
        few = "o-" if len(curve) < 40 else "-"
        axis.plot(curve.along(by), curve.values, few, markersize=3, linewidth=1.1, label=label)
    for place in marks:
        axis.axvline(place, color="#8c8c8c", linewidth=0.8, linestyle="--")
    axis.set_title(heading, fontsize=10)
    axis.set_xlabel(AXIS_NAMES[by])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.7)
    if len(lines) <= MOST_LABELS:
        axis.legend(frameon=False, fontsize=7)

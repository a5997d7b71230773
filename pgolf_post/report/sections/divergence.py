"""κ: the divergence that quantizing one tensor alone causes, measured against predicted."""

from __future__ import annotations

from typing import Any

from pgolf_post.base.storage import read_json
from pgolf_post.cache import CacheEntry
from pgolf_post.report.blocks import Cell, Figure, Section, Table, lines, number
from pgolf_post.report.subject import Subject

PAYLOAD = "kappa.json"  # of a result of stage `kappa`
HEADER = ("tensor or role", "predicted, nats per token", "measured", "standard error", "measured ÷ predicted", "κ used")
SHOWN = 2  # the newest measurements
LOG: dict[str, Any] = {"type": "log", "dtick": 1, "exponentformat": "power"}


def divergence(subject: Subject) -> Section | None:
    """Return the section of the newest measurements of κ."""
    newest = subject.results("kappa")[::-1][:SHOWN]
    figures = [figure for entry in newest if (figure := _figure(entry)) is not None]
    note = (
        "Each is quantized alone. On the line, the quadratic model of the loss is right; above it, it is too hopeful."
    )
    return Section("divergence", "Divergence against prediction", [*figures], note) if figures else None


def _figure(entry: CacheEntry) -> Figure | None:
    kappas: dict[str, dict[str, float]] = read_json(entry.path / PAYLOAD)
    drawn = {name: one for name, one in kappas.items() if one["predicted"] > 0 and one["measured"] > 0}
    rows = [_cells(name, one) for name, one in kappas.items()]
    if not drawn:
        return None
    ends = [min(one["predicted"] for one in drawn.values()), max(one["predicted"] for one in drawn.values())]
    points: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [one["predicted"] for one in drawn.values()],
        "y": [one["measured"] for one in drawn.values()],
        "error_y": {"type": "data", "array": [2 * one["error"] for one in drawn.values()], "thickness": 1},
        "text": [_hover(name, one) for name, one in drawn.items()],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": 8},
        "name": "measured",
    }
    line = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "line": {"dash": "dot"}, "hoverinfo": "skip"}
    layout = {
        "xaxis": {**LOG, "title": {"text": "predicted nats per token"}},
        "yaxis": {**LOG, "title": {"text": "measured nats per token"}},
        "showlegend": False,
    }
    furthest = max(drawn, key=lambda name: abs(drawn[name]["measured"] / drawn[name]["predicted"] - 1))
    ratio = drawn[furthest]["measured"] / drawn[furthest]["predicted"]
    by = str(entry.config.get("kappa", "tensor"))
    run = f"{entry.checkpoint.parent.name}, {entry.path.name[:6]}"
    summary = f"{len(drawn)} of {run}, by {by}; furthest off is {furthest} with {ratio:.2f} times the prediction."
    table = Table(f"Divergence by {by}, {run}", HEADER, rows)
    return Figure(
        f"Measured against predicted divergence, {run}", summary, [points, {**line, "name": "equal"}], layout, table
    )


def _cells(name: str, one: dict[str, float]) -> tuple[Cell, ...]:
    ratio = one["measured"] / one["predicted"] if one["predicted"] else None
    values = (number(one[key], ".3e") for key in ("predicted", "measured", "error"))
    return Cell(name), *values, number(ratio, ".2f"), number(one["kappa"], ".3f")


def _hover(name: str, one: dict[str, float]) -> str:
    numbers = f"predicted {one['predicted']:.3e}, measured {one['measured']:.3e} nats"
    return lines([name, numbers, f"κ {one['kappa']:.2f}"])

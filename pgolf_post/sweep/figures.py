"""A sweep's figures (extra `plots`): bytes against bpb with the Pareto front and the budget, and a curve per axis.

SVG for documents and PNG for eyes, written beside the table. Points carry their paired interval from the control; the
grey band is the rounding noise, inside which nothing is a difference.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import atomic_file
from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row
from pgolf_post.sweep.state import State
from pgolf_post.sweep.table import noise_floor_of

COLOURS = {"control": "#111111", "baseline": "#8a8a8a", "trial": "#1f6fb4", "noise": "#c9c9c9"}
FAR = 3.0  # the budget line is drawn if it lies within so many widths of the points


def draw(state: State, folder: Path) -> list[Path]:
    """Write the figures that the rows allow; returns their paths. Raises PgolfError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise PgolfError("figures need the extra `plots`", hint="pip install 'pgolf-post[plots]'") from None
    matplotlib.use("Agg")
    written = []
    points = pareto_points(state)
    if len(points) > 1:
        written += _save(_pareto(state, points), folder, "pareto")
    for number, (axis, rows) in enumerate(sorted(curves(state).items())):
        written += _save(_curve(state, axis, rows), folder, f"curve_{number}")
    return written


def pareto_points(state: State) -> list[tuple[Row, int, float]]:
    """Return (row, bytes, bpb on the deciding stage) of every packed and scored trial, noise repeats included."""
    points = []
    for listed in state.listed:
        row = state.rows.get(listed.id)
        if row and "total_bytes" in row.result and "bpb" in row.result:
            points.append((row, int(row.result["total_bytes"]), float(row.result["bpb"])))
    return points


def pareto_front(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the points that no other beats in both bytes and bpb, by bytes."""
    front: list[tuple[int, float]] = []
    for size, bpb in sorted(points):
        if not front or bpb < front[-1][1]:
            front.append((size, bpb))
    return front


def curves(state: State) -> dict[str, list[Row]]:
    """Return axis → its rows by value, the control's among them where it lies on it, of axes with 3 numbers or more."""
    axes: dict[str, list[Row]] = defaultdict(list)
    for listed in state.listed:
        row, trial = state.rows.get(listed.id), listed.trial
        is_number = isinstance(trial.value, int | float) and not isinstance(trial.value, bool)
        if row and trial.axis and is_number and "bpb" in row.result:
            rest = ", ".join(f"{key} = {value}" for key, value in trial.changes if key != trial.axis)
            axes[f"{trial.axis} ({rest})" if rest else trial.axis].append(row)
    return {
        axis: sorted(rows, key=lambda row: float(_value(row))) for axis, rows in axes.items() if len(rows) > 2
    }  # fmt: skip


def _value(row: Row) -> Any:
    return row.settings["changes"][row.settings["axis"]]


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _pareto(state: State, points: list[tuple[Row, int, float]]) -> Any:
    figure, axes = _figure()
    ordinary = [(size, bpb) for row, size, bpb in points if row.settings["role"] != "noise"]
    front = pareto_front(ordinary)
    axes.step(*zip(*front, strict=True), where="post", color="#1f6fb4", alpha=0.4, linewidth=1.2, label="Pareto front")
    for row, size, bpb in points:
        role = row.settings["role"]
        half = _half(state, row)
        axes.errorbar(size, bpb, yerr=half, fmt="o", markersize=5, capsize=2, color=COLOURS[role], elinewidth=0.6)
    _annotate(axes, [(_label(row), size, bpb) for row, size, bpb in points if row.settings["role"] != "noise"])
    sizes = [size for _, size, _ in points]
    budget, width = state.spec.budget_bytes, max(max(sizes) - min(sizes), 1)
    if min(sizes) - FAR * width <= budget <= max(sizes) + FAR * width:
        axes.axvline(budget, color="#c0392b", linewidth=1.0, linestyle="--", label=f"budget {budget:,}")
        note = ""
    else:
        side = "left" if budget < min(sizes) else "right"
        note = f"   (budget {budget:,} lies far to the {side})"
    axes.set_xlabel(f"total bytes{note}")
    axes.set_ylabel(f"bpb, {state.spec.deciding_stage}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_locator(_few_ticks())
    axes.set_title(state.spec.question, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)


def _half(state: State, row: Row) -> float | None:
    """Return half of the paired interval: a bar says what is known of the difference from the control."""
    score = row.result.get(str(state.spec.deciding_stage), {})
    return None if score.get("low_bpb") is None else (score["high_bpb"] - score["low_bpb"]) / 2


def _annotate(axes: Any, named: list[tuple[str, int, float]]) -> None:
    """Write names beside points, alternately above and below so that neighbours do not cover each other."""
    for place, (name, size, bpb) in enumerate(sorted(named, key=lambda one: one[1])):
        up = place % 2 == 0
        shift, side = (6, 7) if up else (6, -12), "left"
        axes.annotate(_short(name), (size, bpb), xytext=shift, textcoords="offset points", fontsize=6.5, ha=side)


def _label(row: Row) -> str:
    """Return a trial's value where one axis tells all of it, else its name."""
    changes = row.settings["changes"]
    if row.settings["role"] == "trial" and row.settings["axis"] and len(changes) == 1:
        return str(_value(row)) if "@" not in row.settings["axis"] else row.name
    return row.name


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:33] + "…"


def _curve(state: State, axis: str, rows: list[Row]) -> Any:
    figure, axes = _figure()
    stage = str(state.spec.deciding_stage)
    places = [float(_value(row)) for row in rows]
    values = [row.result[stage].get("difference_bpb", 0.0) for row in rows]
    halves = [_half(state, row) or 0.0 for row in rows]
    floor = noise_floor_of(state)
    if floor is not None:
        axes.axhspan(-floor, floor, color="#ececec", label=f"rounding noise ±{floor:.5f}")
    axes.axhline(0, color="#111111", linewidth=0.8)
    axes.errorbar(places, values, yerr=halves, fmt="o-", capsize=3, color="#1f6fb4", label="Δ bpb from the control")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"Δ bpb, {stage} ({100 * state.spec.stages.level:g} % paired)")
    sizes = [row.result.get("total_bytes") for row in rows]
    if None not in sizes:
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.plot(places, sizes, "s--", color="#d98324", markersize=4, linewidth=1.0, label="bytes")
        right.set_ylabel("total bytes", color="#d98324")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.plot([], [], "s--", color="#d98324", markersize=4, label="bytes (right)")
    axes.set_title(state.spec.question, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write the figure as SVG and PNG; returns their paths."""
    written = []
    for suffix in ("svg", "png"):
        with atomic_file(folder / f"{name}.{suffix}") as path:
            figure.savefig(path, format=suffix)
        written.append(folder / f"{name}.{suffix}")
    return written

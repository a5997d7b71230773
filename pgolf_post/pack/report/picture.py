"""Picture of an artifact's bytes: the budget on top, every role below, a segment per tensor.

Drawn with matplotlib (extra `plots`), without a display: the file's ending decides between svg, png and pdf.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_post.base.storage import atomic_file
from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.pack.container import split_role
from pgolf_post.pack.report.size import SizeReport
from pgolf_post.pack.report.tensor_bytes import CONTAINER, TensorBytes, role_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNDATED: dict[str, Any] = {
    ".svg": {"Date": None},
    ".png": {},
    ".pdf": {"CreationDate": None},
}
MISSING = "matplotlib is not installed (pip install 'pgolf-post[plots]')"
LEAST_SHARE = 0.002  # of the artifact: smaller roles are drawn as one
NUMBERED_SHARE = 0.035  # of the axis: narrower segments go without their block's number
PALETTE = ("#4878a8", "#d1813a", "#5a9c5a", "#b4575a", "#8a72ad", "#9b7a5f", "#c98bb5", "#a5a23c", "#4fa6b3")
GREY, LIGHT, INK = "#8c8c8c", "#e9e9e9", "#222222"


def require_plots(path: Path) -> None:
    """Raise SettingsError for an ending that cannot be drawn, NotFoundError naming the extra without matplotlib."""
    if path.suffix not in UNDATED:
        raise SettingsError(f"{path}: a picture ends in {', '.join(UNDATED)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NotFoundError(MISSING, hint="pip install 'pgolf-post[plots]'") from None


def draw_size(report: SizeReport, rows: Sequence[TensorBytes], path: Path) -> None:
    """Write the picture of a count and of its artifact's tensors (`tensor_table`), in one rename.

    Raises what `require_plots` raises, PgolfError if it cannot be written.
    """
    require_plots(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bars = _bars(rows)
    figure = Figure(figsize=(11, 2.3 + 0.36 * len(bars)), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=[1.1, 0.5 + 0.36 * len(bars)])
    _draw_budget(top, report)
    _draw_roles(below, bars, report.artifact_bytes)
    with rc_context({"svg.hashsalt": "pgolf-post", "svg.fonttype": "none"}), atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=UNDATED[path.suffix])


def _bars(rows: Sequence[TensorBytes]) -> list[tuple[TensorBytes, list[TensorBytes]]]:
    """Roles with their tensors, the largest first; then the small ones as one, and the container."""
    roles = [role for role in role_table(rows) if role.role != CONTAINER]
    least = LEAST_SHARE * sum(row.stored_bytes for row in rows)
    small = [role for role in roles if role.stored_bytes < least]
    bars = [(role, [row for row in rows if row.role == role.role]) for role in roles if role.stored_bytes >= least]
    if small:
        name = f"{len(small)} small roles"
        sums = (sum(role.num_weights for role in small), sum(role.stored_bytes for role in small))
        bars.append((TensorBytes(name, name, *sums), small))
    return bars + [(row, [row]) for row in rows if row.role == CONTAINER]


def _draw_budget(axes: Axes, report: SizeReport) -> None:
    """Artifact, code and what is left, against the budget."""
    width = max(report.budget_bytes, report.total_bytes)
    parts = [("artifact", report.artifact_bytes, PALETTE[0]), ("code", report.code_bytes, PALETTE[1])]
    parts += [("headroom", max(0, report.headroom_bytes), LIGHT)]
    start, texts = 0, []
    for label, size, colour in parts:
        axes.barh(0, size, left=start, color=colour, edgecolor="white", height=0.7)
        if size > 0.12 * width:
            ink = INK if colour == LIGHT else "white"
            axes.text(start + size / 2, 0, f"{label}\n{size:,}", ha="center", va="center", color=ink, fontsize=9)
        texts.append(f"{label} {size:,}")
        start += size
    axes.axvline(report.budget_bytes, color="#b3261e", linestyle="--", linewidth=1.5)
    verdict = f"{-report.headroom_bytes:,} bytes OVER" if report.over else f"{report.headroom_bytes:,} bytes left"
    axes.set_title(
        f"{report.artifact.path.name}: {report.total_bytes:,} of {report.budget_bytes:,} bytes, {verdict}"
        + ("" if report.code else " (no code counted)"),
        loc="left", fontsize=12, color=INK,
    )  # fmt: skip
    axes.set_xlabel(f"bytes: {', '.join(texts)}; dashed: the budget", fontsize=9)
    axes.set_xlim(0, width * 1.005)
    axes.set_yticks([])
    _plain(axes)


def _draw_roles(axes: Axes, bars: Sequence[tuple[TensorBytes, list[TensorBytes]]], artifact_bytes: int) -> None:
    """One bar per role, one segment per tensor, numbered by block."""
    longest = max(role.stored_bytes for role, _ in bars)
    for line, (role, tensors) in enumerate(bars):
        colour, start = GREY if role.role == CONTAINER else PALETTE[line % len(PALETTE)], 0
        for number, row in enumerate(_by_block(tensors)):
            alpha = 1.0 if number % 2 == 0 else 0.75
            axes.barh(line, row.stored_bytes, left=start, color=colour, alpha=alpha, edgecolor="white", linewidth=0.5)
            block = split_role(row.name)[1]
            if block is not None and row.stored_bytes > NUMBERED_SHARE * longest:
                middle = start + row.stored_bytes / 2
                axes.text(middle, line, str(block), ha="center", va="center", color="white", fontsize=8)
            start += row.stored_bytes
        bits = "" if role.bits_per_weight is None else f", {role.bits_per_weight:.2f} bits/weight"
        said = f" {role.stored_bytes:,} ({role.stored_bytes / max(1, artifact_bytes):.1%}{bits})"
        axes.text(start, line, said, va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(bars)), [role.role for role, _ in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.36)
    axes.set_xlabel("bytes by role, scales included; a segment per tensor, numbered by block", fontsize=9)
    _plain(axes)


def _by_block(rows: Sequence[TensorBytes]) -> list[TensorBytes]:
    return sorted(rows, key=lambda row: (split_role(row.name)[1] or 0, row.name))


def _plain(axes: Axes) -> None:
    """No frame, thousands separated."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

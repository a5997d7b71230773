"""Reports of statistics: a table with one row per site for people, and facts for machines."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.stats import Stats

HEADER = ("site", "width", "trace / token", "mean diagonal", "largest / mean", "dead columns", "share of each visit")


def title(stats: Stats) -> str:
    """Return one line: seconds of collecting, number of sites and tokens, and whether the backward half is there."""
    how = "cached; collected" if stats.cached else "collected"
    half = ", with the backward half" if stats.fisher else ""
    return f"{how} in {stats.seconds:.1f} s: {len(stats.hessians)} sites over {stats.num_tokens:,} tokens{half}"


def rows(stats: Stats) -> list[tuple[str, ...]]:
    """Return one row of cells under HEADER for each site."""
    return [
        (site, *_cells(hessian.diagonal() / stats.num_tokens, stats.pass_traces[site] / stats.num_tokens))
        for site, hessian in stats.hessians.items()
    ]


def _cells(
    diagonal: Tensor,  # (in,) mean of x² over tokens
    traces: Tensor,  # (passes,) mean of |x|² over tokens, of each visit
) -> tuple[str, ...]:
    ratio = float(diagonal.max() / diagonal.mean()) if diagonal.any() else 0.0
    dead = int((diagonal <= 0).sum())
    shares = " + ".join(f"{share:.0%}" for share in (traces / traces.sum()).tolist()) if len(traces) > 1 else ""
    numbers = (f"{float(traces.sum()):.4g}", f"{float(diagonal.mean()):.4g}", f"{ratio:.1f}", str(dead))
    return str(len(diagonal)), *numbers, shares


def answer(stats: Stats, view_id: str, settings: CalibrationSettings, seconds: float) -> dict[str, Any]:
    """Return the JSON answer. `traces` are per token, `seconds` those of the whole command."""
    return {
        "checkpoint_id": view_id,
        "stats_id": stats.id,
        "sites": len(stats.hessians),
        "tokens": stats.num_tokens,
        "cached": stats.cached,
        "fisher": stats.fisher is not None,
        "stale": stats.stale,
        "traces": {site: float(traces.sum()) / stats.num_tokens for site, traces in stats.pass_traces.items()},
        "settings": settings.model_dump(mode="json"),
        "collect_seconds": stats.seconds,
        "seconds": seconds,
    }

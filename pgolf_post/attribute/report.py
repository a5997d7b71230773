"""The table of an attribution, for people: rows of text, printed by `attribute`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgolf_post.attribute.stage import Attribution

HEADER = ("left in float", "tensors", "weights", "bytes", "bpb gained", "95 %, by document", "bpb per 100 KB", "")


def attribution_title(result: Attribution) -> str:
    """Return where the attribution lies, and what the quantized model scores and weighs."""
    control = result.control
    return (
        f"{result.folder}\nquantized: {control['bpb']:.5f} bpb of {control['tokens']:,} tokens, "
        f"{control['artifact_bytes']:,} bytes"
    )


def attribution_rows(result: Attribution) -> list[tuple[str, ...]]:
    """Return a line per group."""
    return [_shown(row) for row in result.rows]


def _shown(row: Mapping[str, Any]) -> tuple[str, ...]:
    bounds = row["low_bpb"], row["high_bpb"]
    interval = "one document" if None in bounds else f"{bounds[0]:+.5f} … {bounds[1]:+.5f}"
    rate = "" if row["gain_per_100kb"] is None else f"{row['gain_per_100kb']:+.5f}"
    counts = (f"{row[key]:,}" for key in ("tensors", "weights", "group_bytes"))
    return row["group"], *counts, f"{row['gain_bpb']:+.5f}", interval, rate, "NO-OP" if row["no_op"] else ""

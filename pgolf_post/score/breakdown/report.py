"""Tables of breakdowns for people: rows of text, printed by `eval --breakdown` and `compare --breakdown`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pgolf_post.score.breakdown.difference import BinDifference
from pgolf_post.score.breakdown.sums import BinSums, Breakdown

BINS_HEADER = ("bin", "tokens", "share of bits", "nats/token", "top 1", "top 5", "confidence")
DIFFERENCES_HEADER = ("bin", "tokens", "Δ bpb", "±", "Δ nats/token", "Δ top 1, %")  # ±: half the interval
SHOWN_CONFUSIONS = 20


def shown(bins: Sequence[BinSums], kind: str) -> list[BinSums]:
    """Return the bins that a table shows: all, or of confusions the costliest."""
    return list(bins)[: 2 + SHOWN_CONFUSIONS] if kind == "confusions" else list(bins)


def bin_rows(bins: Sequence[BinSums], kind: str) -> list[tuple[str, ...]]:
    """Return a kind's table: the share of all bits, and how well the model knew what came."""
    total = math.fsum(one.nats for one in bins)
    return [
        (
            one.name,
            f"{one.tokens:,}",
            f"{100 * one.nats / total:.2f} %",
            f"{one.nats_per_token:.4f}",
            *(f"{100 * value / one.tokens:.1f} %" for value in (one.top1, one.top5, one.confidence)),
        )
        for one in shown(bins, kind)
    ]


def summary_line(breakdown: Breakdown) -> str:
    """Return accuracies and the expected calibration error in one line."""
    accuracies = f"top 1 {100 * breakdown.top1_accuracy:.2f} %, top 5 {100 * breakdown.top5_accuracy:.2f} %"
    return f"{accuracies}, expected calibration error {100 * breakdown.calibration_error:.2f} points"


def difference_rows(differences: Sequence[BinDifference], kind: str) -> list[tuple[str, ...]]:
    """Return a kind's table of paired differences; of confusions, those that changed most of the pairs that both name.

    A pair that only one of the two names is among the other's "all other pairs".
    """
    rows = list(differences)
    if kind == "confusions":
        rows = sorted((one for one in rows if one.tokens and one.control_tokens), key=lambda one: -abs(one.bpb))[
            : 2 + SHOWN_CONFUSIONS
        ]
    return [_difference_row(one) for one in rows]


def _difference_row(one: BinDifference) -> tuple[str, ...]:
    same = one.tokens == one.control_tokens
    tokens = f"{one.tokens:,}" if same else f"{one.tokens:,}/{one.control_tokens:,}"
    half = (one.high - one.low) / 2
    per_token, top1 = "", ""
    if one.tokens and one.control_tokens:
        per_token = f"{one.nats / one.tokens - one.control_nats / one.control_tokens:+.4f}"
        top1 = f"{100 * (one.top1 / one.tokens - one.control_top1 / one.control_tokens):+.2f}"
    known = f"{half:.6f}" if math.isfinite(half) else "unknown"
    return one.name, tokens, f"{one.bpb:+.6f}", known, per_token, top1

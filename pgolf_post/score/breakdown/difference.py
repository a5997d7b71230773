"""Two scores' breakdowns, bin by bin: what each bin adds to the difference in bits per byte, and how sure that is.

    Δ_bin = Σ_c D_c,bin / Σ_c B_c,   D_c,bin = (candidate's nats of the bin in document c - control's) / ln 2

with the whole document's bytes below the line, so that the bins of a kind add up to the difference of the two scores.
The interval is that of the difference itself: documents are the clusters, left out one at a time (compare/paired.py).
Each interval stands alone: of twenty bins without a difference, one at 95 % excludes zero by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score
from pgolf_post.score.breakdown.sums import Breakdown, Cells
from pgolf_post.score.compare.paired import Clusters, t_interval


@dataclass(frozen=True)
class BinDifference:
    """A bin's part of the candidate's bits per byte less the control's; negative is better."""

    name: str
    bpb: float
    low: float
    high: float
    tokens: int  # of the candidate's bin
    control_tokens: int
    nats: float  # of the candidate's bin
    control_nats: float
    top1: int
    control_top1: int

    def facts(self) -> dict[str, Any]:
        """Return JSON facts; null for an infinite bound."""
        bounds = {name: value if math.isfinite(value) else None for name, value in self._bounds().items()}
        candidate = {"tokens": self.tokens, "nats": self.nats, "top1": self.top1}
        control = {"tokens": self.control_tokens, "nats": self.control_nats, "top1": self.control_top1}
        own = {"bin": self.name, "difference_bpb": self.bpb, **bounds, **candidate}
        return {**own, **{f"control_{name}": value for name, value in control.items()}}

    def _bounds(self) -> dict[str, float]:
        return {"low_bpb": self.low, "high_bpb": self.high}


@dataclass(frozen=True)
class ScoreSums:
    """A score with its breakdown."""

    score: Score
    breakdown: Breakdown


def bin_differences(candidate: ScoreSums, control: ScoreSums, kind: str, level: float = 0.95) -> list[BinDifference]:
    """Return the difference of every bin of a kind, in the order of the candidate's bins.

    Raises MismatchError if the two did not score the same text.
    """
    first, second = candidate.score, control.score
    if not np.array_equal(first.document_bytes, second.document_bytes):
        raise MismatchError(
            f"the two breakdowns are of different text: {first.bytes:,} and {second.bytes:,} bytes",
            hint="score both with the same --max-tokens, --tail and, where the tail is dropped, the same --seq-len",
        )
    mine, theirs = candidate.breakdown.kinds[kind], control.breakdown.kinds[kind]
    names = list(dict.fromkeys([*_held(mine), *_held(theirs)]))
    present = np.flatnonzero(first.document_tokens)
    return [_difference(name, mine, theirs, first, present, level) for name in names]


def _held(cells: Cells) -> list[str]:
    """Return the names of the bins that hold a target."""
    return [cells.names[number] for number in np.unique(cells.bin)]


def _difference(
    name: str,
    candidate: Cells,
    control: Cells,
    score: Score,
    present: np.ndarray,  # (clusters,) documents that hold a scored token
    level: float,
) -> BinDifference:
    documents = len(score.document_nats)

    def sums(cells: Cells, what: str) -> np.ndarray:
        return cells.by_document(name, what, documents)

    bits = (sums(candidate, "nats") - sums(control, "nats"))[present] / math.log(2)
    text_bytes = score.document_bytes[present]
    clusters = Clusters(bits, text_bytes, len(bits), score.tokens, 0.0)  # units and their variance are not asked for
    interval = t_interval(clusters, level)
    counts = [int(sums(cells, what).sum()) for what in ("tokens", "top1") for cells in (candidate, control)]
    nats = [math.fsum(sums(cells, "nats")) for cells in (candidate, control)]
    return BinDifference(name, interval.bpb, interval.low, interval.high, *counts[:2], *nats, *counts[2:])

"""Sliding-window scoring: every target predicted from nearly a full window of context.

Windows of seq_len tokens move by `stride`; each scores the targets that no earlier one has, so all but the first score
`stride` of them, with at least seq_len - stride tokens of context. With stride = seq_len this is plain scoring. The
public scripts count the same targets in both protocols: `tail="drop"` leaves out what does not fill a whole window.
Logits are computed only where they are scored, about seq_len / stride times fewer than in full.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pgolf_post.errors import MismatchError
from pgolf_post.score.spans import Span
from pgolf_post.settings import PrecisionSettings


class SlidingProtocol(PrecisionSettings):
    """Sliding-window scoring: what exactly was scored. Part of a score's identity."""

    protocol: Literal["sliding"] = "sliding"
    split: Literal["train", "val"] = "val"
    seq_len: int = Field(ge=1)
    stride: int = Field(64, ge=1, description="targets that each window but the first scores; at most seq_len")
    max_tokens: int | None = Field(None, ge=2, description="score only the first max_tokens tokens")
    tail: Literal["drop", "score"] = "drop"


def sliding_spans(targets: int, seq_len: int, stride: int) -> list[Span]:
    """Return spans that score targets 1 … `targets` once each. Raises MismatchError for a stride beyond the window."""
    if not 1 <= stride <= seq_len:
        raise MismatchError(f"stride {stride} is not in 1..{seq_len}, the window's length")
    first = min(seq_len, targets)
    return [Span(0, first, first), *later_spans(first + 1, targets + 1, seq_len, stride)]


def later_spans(first: int, stop: int, seq_len: int, stride: int) -> list[Span]:
    """Return spans that score targets [first, stop), `stride` at a time, each moved on by a stride from a full window.

    A last one that scores fewer begins where a full one would, and is shorter.
    """
    spans = []
    for target in range(first, stop, stride):
        start = max(0, target + stride - 1 - seq_len)
        end = min(target + stride, stop)  # one past the last scored target
        spans.append(Span(start, end - 1 - start, end - target))
    return spans

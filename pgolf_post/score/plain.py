"""Plain scoring: the text cut into windows of seq_len tokens, each scored once from an empty context.

Window i reads tokens [iL, iL+L) and predicts [iL+1, iL+L+1); every target is scored exactly once. `tail="drop"` leaves
out the last partial window, as the challenge does; `tail="score"` scores it.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import nn

from pgolf_post.base.progress import progress_bar
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score, require_finite, sum_units
from pgolf_post.score.session import Session
from pgolf_post.score.spans import Span, batch_nats, batches_of, fitting, places_of
from pgolf_post.settings import Precision, PrecisionSettings

BATCH_TOKENS = 32768  # of one forward on a GPU


class PlainProtocol(PrecisionSettings):
    """Plain scoring: what exactly was scored. Part of a score's identity."""

    protocol: Literal["plain"] = "plain"
    split: Literal["train", "val"] = "val"
    seq_len: int = Field(ge=1)
    max_tokens: int | None = Field(None, ge=2, description="score only the first max_tokens tokens")
    tail: Literal["drop", "score"] = "drop"


def windows(num_tokens: int, seq_len: int, tail: str) -> list[tuple[int, int]]:  # [(start, length)]
    """Return input windows of a text of `num_tokens` tokens."""
    full = (num_tokens - 1) // seq_len
    spans = [(i * seq_len, seq_len) for i in range(full)]
    rest = num_tokens - 1 - full * seq_len
    return [*spans, (full * seq_len, rest)] if tail == "score" and rest else spans


def score_plain(
    module: Any,  # a LanguageModel
    tokens: np.ndarray,  # (n,) uint16
    token_bytes: np.ndarray,  # (n,) int64 bytes of text per token
    protocol: PlainProtocol,
    description: str = "scoring",
) -> Score:
    """Score a text. Raises MismatchError if it is shorter than one window."""
    spans = protocol_windows(tokens, protocol)
    chosen = np.arange(len(spans))
    return score_windows(module, tokens, token_bytes, spans, chosen, description, precision=protocol.precision)


def protocol_windows(tokens: np.ndarray, protocol: PlainProtocol) -> list[tuple[int, int]]:
    """Return a text's windows under a protocol. Raises MismatchError if it is shorter than one."""
    spans = windows(len(tokens), protocol.seq_len, protocol.tail)
    if not spans:
        raise MismatchError(f"{len(tokens)} tokens are fewer than one window of {protocol.seq_len} + 1")
    return spans


def score_windows(
    module: Any,  # a LanguageModel
    tokens: np.ndarray,  # (n,) uint16
    token_bytes: np.ndarray,  # (n,) int64
    spans: list[tuple[int, int]],  # the text's windows
    chosen: np.ndarray,  # (windows,) int64, which of them to score
    description: str = "scoring",
    pieces: np.ndarray | None = None,  # (n,) int64, to cut units finer than documents
    precision: Precision = "fp32",
) -> Score:
    """Score some windows of a text."""
    started = time.perf_counter()
    picked = [Span(spans[i][0], spans[i][1], spans[i][1]) for i in chosen]
    nats: list[np.ndarray] = []
    with progress_bar(description, len(picked), "windows") as advance:
        for batch in batches_of(picked, fitting(BATCH_TOKENS, module)):
            nats.append(batch_nats(module, tokens, batch, Session(), precision))
            require_finite(tokens, places_of(batch), nats[-1])
            advance(len(batch))
    places = places_of(picked)
    window = np.repeat(chosen, [span.scored for span in picked])
    seconds = time.perf_counter() - started
    return sum_units(tokens, places, window, np.concatenate(nats), token_bytes, seconds, pieces)


def score_folder(module: nn.Module, data: DataFolder, protocol: PlainProtocol, description: str = "scoring") -> Score:
    """Score a data folder's split with a module whose vocabulary matches it."""
    tokens = data.tokens(protocol.split, protocol.max_tokens)
    return score_plain(module, tokens, data.token_bytes(protocol.split, tokens), protocol, description)

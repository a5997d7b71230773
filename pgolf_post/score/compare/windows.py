"""Scores of chosen windows of a text, for comparisons that need not score all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pgolf_post.score.bpb import Score, require_finite, sum_units
from pgolf_post.score.compare.paired import require_same_text
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.session import Session
from pgolf_post.score.spans import Span, batch_nats, batches_of, fitting, places_of
from pgolf_post.settings import Precision

ScoreWindows = Callable[[np.ndarray], tuple[Score, Score]]  # windows (k,) → candidate's and control's sums of them


def window_bits(candidate: Score, control: Score, chosen: np.ndarray) -> np.ndarray:  # (k,) ascending → (k,)
    """Return the difference of each of the windows, candidate's minus control's, in bits."""
    every = np.arange(len(candidate.window))
    require_same_text(candidate, control, every, every)
    bits = (candidate.unit_nats - control.unit_nats) / math.log(2)
    return np.bincount(np.searchsorted(chosen, candidate.window), bits, minlength=len(chosen))


def bytes_of_windows(spans: list[Span], token_bytes: np.ndarray) -> np.ndarray:  # (windows,) int64
    """Return how many bytes of text the scored targets of each window stand for."""
    return np.array([int(token_bytes[slice(*span.targets)].sum()) for span in spans])


def window_scorer(
    candidate: Any,
    control: Any,
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],
    precision: Precision = "fp32",
) -> ScoreWindows:
    """Return a function that scores chosen windows of a text with two models."""

    def one(module: Any, chosen: np.ndarray) -> Score:
        return score_chosen(module, tokens, token_bytes, spans, None, chosen, precision)

    return lambda chosen: (one(candidate, chosen), one(control, chosen))


def score_chosen(
    module: Any,  # a LanguageModel
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],  # the text's windows
    pieces: np.ndarray | None,  # (n,)
    chosen: np.ndarray,  # (k,) which of the windows
    precision: Precision = "fp32",
) -> Score:
    """Score chosen windows of a text with one model. Raises NumericsError for nats that are not finite."""
    picked = [spans[i] for i in chosen]
    batches = batches_of(picked, fitting(BATCH_TOKENS, module))
    nats = np.concatenate([batch_nats(module, tokens, batch, Session(), precision) for batch in batches])
    places = places_of(picked)
    require_finite(tokens, places, nats)
    windows = np.repeat(chosen, [span.scored for span in picked])
    return sum_units(tokens, places, windows, nats, token_bytes, 0.0, pieces)

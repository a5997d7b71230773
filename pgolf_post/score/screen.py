"""Screening two models on as little text as the question needs.

Windows of plain scoring come in a seeded random order, the same for both; after each batch the difference is looked at
through a confidence sequence (compare.py), clustered by document or, where documents are few, by pieces of them cut at
blank lines. It stops when the sequence is as tight as asked, or excludes zero, or the text is used up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
from pydantic import Field

from pgolf_post.progress import progress_bar
from pgolf_post.score.bpb import Score, require_finite, sum_units
from pgolf_post.score.compare import Look, Screening, look
from pgolf_post.score.paired import ClusterBy, pair
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.session import Session
from pgolf_post.score.spans import Span, batch_nats, batches_of, fitting, places_of
from pgolf_post.settings import Settings

MIN_CLUSTERS = 30  # before which nothing is decided: the sequence holds for sample sizes from there on

ScoreWindows = Callable[[np.ndarray], tuple[Score, Score]]  # windows (k,) → candidate's and control's sums of them


class ScreenSettings(Settings):
    half_width_bpb: float = Field(0.0005, gt=0, description="stop when the difference is known to ± this")
    level: float = Field(0.95, gt=0.5, lt=1)
    seed: int = Field(0, ge=0, description="of the order in which windows are scored")
    look_every: int = Field(32, ge=1, description="windows between looks")
    cluster_by: ClusterBy = "piece"
    stop_at_zero: bool = Field(True, description="stop as soon as zero is excluded, however wide the interval")


def screen(
    score_windows: ScoreWindows,
    total_windows: int,
    total_tokens: int,
    settings: ScreenSettings,
    quiet: bool = False,  # part of other work that reports for it
) -> Screening:
    """Score windows until the difference is known well enough."""
    order = np.random.default_rng(settings.seed).permutation(total_windows)
    tightest_at = max(2.0 * MIN_CLUSTERS, 0.1 * total_windows)
    held: tuple[Score, Score] | None = None
    looks: list[Look] = []
    silent: AbstractContextManager[Callable[..., None]] = nullcontext(lambda *_: None)
    with silent if quiet else progress_bar("screening", total_windows) as advance:
        for first in range(0, total_windows, settings.look_every):
            chosen = np.sort(order[first : first + settings.look_every])
            scored = score_windows(chosen)
            held = scored if held is None else (joined(held[0], scored[0]), joined(held[1], scored[1]))
            clusters = pair(*held, settings.cluster_by)
            looks.append(look(clusters, first + len(chosen), total_windows, settings.level, tightest_at))
            advance(len(chosen), f"Δ {looks[-1].bpb:+.6f} ± {looks[-1].half:.6f}")
            reason = _reason(looks[-1], settings)
            if reason:
                return Screening(looks, total_tokens, reason)
    return Screening(looks, total_tokens, "all windows are scored")


def _reason(last: Look, settings: ScreenSettings) -> str:
    """Why to stop, or nothing."""
    if last.clusters < MIN_CLUSTERS:
        return ""
    if settings.stop_at_zero and last.excludes_zero:
        return "zero is excluded"
    return f"known to ±{settings.half_width_bpb:g}" if last.half <= settings.half_width_bpb else ""


def joined(first: Score, second: Score) -> Score:
    """Two scores of different windows of one text, as one."""
    names = [field.name for field in fields(Score) if field.name != "seconds"]
    arrays = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    return Score(**arrays, seconds=first.seconds + second.seconds)


def window_scorer(
    candidate: Any,
    control: Any,
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],
    pieces: np.ndarray,  # (n,)
) -> ScoreWindows:
    """Scores chosen windows of a text with two models."""

    def one(module: Any, chosen: np.ndarray) -> Score:
        return score_chosen(module, tokens, token_bytes, spans, pieces, chosen)

    return lambda chosen: (one(candidate, chosen), one(control, chosen))


def score_chosen(
    module: Any,  # a LanguageModel
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],  # the text's windows
    pieces: np.ndarray,  # (n,)
    chosen: np.ndarray,  # (k,) which of the windows
) -> Score:
    """Chosen windows of a text, scored with one model."""
    picked = [spans[i] for i in chosen]
    batches = batches_of(picked, fitting(BATCH_TOKENS, module))
    nats = np.concatenate([batch_nats(module, tokens, batch, Session()) for batch in batches])
    places = places_of(picked)
    require_finite(tokens, places, nats)
    windows = np.repeat(chosen, [span.scored for span in picked])
    return sum_units(tokens, places, windows, nats, token_bytes, 0.0, pieces)

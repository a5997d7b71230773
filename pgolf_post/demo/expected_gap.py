"""The gap of several artifacts of one checkpoint, as the checkpoint itself expects it: precise from a part of the text.

A measured gap is mostly chance on a text as short as the demo's. The divergence KL(p ‖ artifact) is that gap averaged
over the checkpoint's own predictions p (score/compare/expected.py), and 96 windows know it ten times better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pgolf_post.score.compare.estimate import estimate
from pgolf_post.score.compare.expected import score_against
from pgolf_post.score.compare.windows import bytes_of_windows
from pgolf_post.score.spans import Span

NUM_WINDOWS = 96
LEVEL = 0.95
SEED = 0  # of the draw of windows


@dataclass(frozen=True)
class ExpectedGap:
    """A divergence from the unquantized model, in bits per byte of text, and half the width of its interval."""

    bpb: float
    half: float


def expected_gaps(
    reference: Any,  # a LanguageModel, as are the models
    models: Sequence[Any],
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],  # the text's windows
) -> list[ExpectedGap]:
    """Return each model's expected gap on the whole text, from the same drawn windows. Raises MismatchError."""
    count = min(NUM_WINDOWS, len(spans))
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(spans))[:count])
    all_bytes = bytes_of_windows(spans, token_bytes)
    sums = score_against(reference, models, tokens, token_bytes, spans, chosen)
    gaps = []
    for score in sums.divergences:
        bits = np.bincount(np.searchsorted(chosen, score.window), score.unit_nats / math.log(2), minlength=count)
        bpb, error = estimate(bits, all_bytes[chosen], all_bytes)
        gaps.append(ExpectedGap(bpb, float(stdtrit(max(1, count - 2), 0.5 + LEVEL / 2)) * error))
    return gaps

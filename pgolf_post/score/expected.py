"""The difference that a reference expects: two quantizations of one checkpoint without the luck of the text's words.

Where the text has the word y, the losses of two models A and B differ by log B(y) - log A(y). A reference distribution
p, that of the unquantized model, says what this comes to over all words that could stand there:

    Σ_v p(v) · (log B(v) - log A(v)) = KL(p ‖ A) - KL(p ‖ B)

Over text that is as p says, both have the same mean. But what one word says of a rounding error is mostly chance, to
first order in the error, and that chance is gone from the expectation: it is known to the same precision from a small
part of the text (docs/BENCHMARKS.md says how small). This is the estimator of Rao and Blackwell if p is the truth. As
p is only a model, the measured difference of the same windows is kept beside it, and what it has over the expectation,
the *surprise*, with an interval: where that excludes zero, the text is not as p says, and only measuring is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from pgolf_post.errors import MismatchError
from pgolf_post.quantize.divergence import divergences_of
from pgolf_post.score.bpb import Score, require_finite, sum_units
from pgolf_post.score.nats import distribution
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.screen import estimate, window_bits
from pgolf_post.score.spans import Span, batches_of, fitting, halving, places_of, scored_hidden


@dataclass(frozen=True)
class Interval:
    """An estimate for the whole text, in bpb, and half the width of its interval (0 once every window is scored)."""

    bpb: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.bpb) > self.half


class ExpectedWindows:
    """Scores windows with two models by their divergence from a third, and keeps their losses too.

    Raises MismatchError where vocabularies differ, NumericsError where something is not finite.
    """

    def __init__(
        self,
        reference: Any,  # LanguageModels, these three
        candidate: Any,
        control: Any,
        tokens: np.ndarray,  # (n,)
        token_bytes: np.ndarray,  # (n,)
        spans: list[Span],  # the text's N windows
    ) -> None:
        self.modules = (reference, candidate, control)
        self.tokens, self.token_bytes, self.spans = tokens, token_bytes, spans
        self.divergence_bits = np.zeros((2, len(spans)))  # of candidate and control, once scored
        self.measured_bits = np.zeros(len(spans))  # candidate's loss less control's, once scored
        self.drawn = np.zeros(len(spans), bool)

    def __call__(self, chosen: np.ndarray) -> tuple[Score, Score]:  # windows (k,) ascending
        """Sums of both divergences over windows, in the place of nats."""
        picked = [self.spans[i] for i in chosen]
        batches = batches_of(picked, fitting(BATCH_TOKENS, self.modules[0]))
        values = np.concatenate([halving(self._of_batch, batch) for batch in batches], axis=-1)
        places = places_of(picked)
        windows = np.repeat(chosen, [span.scored for span in picked])
        scores = []
        for row in values:
            require_finite(self.tokens, places, row)
            scores.append(sum_units(self.tokens, places, windows, row, self.token_bytes, 0.0))
        for model, score in enumerate(scores[:2]):
            bits = score.unit_nats / math.log(2)
            self.divergence_bits[model, chosen] = np.bincount(np.searchsorted(chosen, score.window), bits)
        self.measured_bits[chosen] = window_bits(scores[2], scores[3], chosen)
        self.drawn[chosen] = True
        return scores[0], scores[1]

    @torch.no_grad()
    def _of_batch(self, batch: list[Span]) -> np.ndarray:  # (4, batch · scored) float64
        """Divergences of candidate and control, then the nats of both."""
        expected, divergences, nats = None, [], []
        for module in self.modules:
            hidden, targets = scored_hidden(module, self.tokens, batch)
            found = distribution(module, hidden).float()
            if expected is None:
                expected = found
                continue
            if found.shape != expected.shape:
                raise MismatchError(
                    f"the reference tells {expected.shape[1]} tokens apart, another model {found.shape[1]}",
                    hint="--reference is the checkpoint that both were made from",
                )
            divergences.append(divergences_of(expected, found).double().cpu())
            nats.append(-found.gather(-1, targets[:, None])[:, 0].double().cpu())
        return torch.stack([*divergences, *nats]).numpy()

    def divergences(self, all_bytes: np.ndarray, level: float) -> tuple[Interval, Interval]:  # (N,) int64
        """Of candidate and control from the reference, in bpb."""
        candidate, control = (self._interval(bits, all_bytes, level) for bits in self.divergence_bits)
        return candidate, control

    def measured(self, all_bytes: np.ndarray, level: float) -> Interval:
        """The difference in loss, from the same windows."""
        return self._interval(self.measured_bits, all_bytes, level)

    def surprise(self, all_bytes: np.ndarray, level: float) -> Interval:
        """What the measured difference has over the expected one."""
        expected = self.divergence_bits[0] - self.divergence_bits[1]
        return self._interval(self.measured_bits - expected, all_bytes, level)

    def _interval(self, bits: np.ndarray, all_bytes: np.ndarray, level: float) -> Interval:
        drawn = np.flatnonzero(self.drawn)
        bpb, error = estimate(bits[drawn], all_bytes[drawn], all_bytes)
        degrees = max(1, len(drawn) - 2)
        return Interval(bpb, float(stdtrit(degrees, 0.5 + level / 2)) * error)

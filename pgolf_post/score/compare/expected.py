"""The difference that a reference expects: two quantizations of one checkpoint without the luck of the text's words.

Where the text has the word y, the losses of two models A and B differ by log B(y) - log A(y). A reference distribution
p, that of the unquantized model, says what this comes to over all words that could stand there:

    Σ_v p(v) · (log B(v) - log A(v)) = KL(p ‖ A) - KL(p ‖ B)

Over text that is as p says, both have the same mean. But what one word says of a rounding error is mostly chance, to
first order in the error, and that chance is gone from the expectation: it is known to the same precision from a small
part of the text (docs/results/score.md). This is the estimator of Rao and Blackwell if p is the truth. As
p is only a model, the measured difference of the same windows is kept beside it, and what it has over the expectation,
the *surprise*. Were the text as p says, windows' surprises would be uncorrelated with mean zero (each token's is, given
all before it), so their squares say how large their sum may be by chance. Where it is larger, the text is not as p
says, not in what these two models differ in, and only measuring is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from pgolf_post.base.divergence import divergences_of
from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score, require_finite, sum_units
from pgolf_post.score.compare.estimate import estimate
from pgolf_post.score.compare.windows import window_bits
from pgolf_post.score.nats import distribution
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.spans import Span, batches_of, fitting, halving, places_of, scored_hidden


@dataclass(frozen=True)
class Against:
    """Sums over the same windows: losses, and divergences of models from a reference (in the place of nats)."""

    reference: Score
    losses: list[Score]  # one per model
    divergences: list[Score]  # one per model


def score_against(
    reference: Any,  # a LanguageModel, as are the models
    models: Sequence[Any],
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],  # the text's windows
    chosen: np.ndarray,  # (k,) which of them, ascending
    pieces: np.ndarray | None = None,  # (n,) int64, to cut units finer than documents
    advance: Callable[[int], None] = lambda windows: None,  # called with each number of windows done
) -> Against:
    """Score windows with a reference and models. Raises MismatchError for other vocabularies, NumericsError."""
    picked = [spans[i] for i in chosen]
    values = []
    for batch in batches_of(picked, fitting(BATCH_TOKENS, reference)):
        values.append(halving(lambda part: target_values(reference, models, tokens, part), batch))
        advance(len(batch))
    places = places_of(picked)
    windows = np.repeat(chosen, [span.scored for span in picked])
    scores = []
    for row in np.concatenate(values, axis=-1):
        require_finite(tokens, places, row)
        scores.append(sum_units(tokens, places, windows, row, token_bytes, 0.0, pieces))
    return Against(scores[0], scores[1 : 1 + len(models)], scores[1 + len(models) :])


def expected_score(
    reference: Any,  # LanguageModels, both
    model: Any,
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,)
    spans: list[Span],
    chosen: np.ndarray,  # (k,) ascending
    pieces: np.ndarray | None = None,  # (n,) int64
) -> Score:
    """Return a model's expected loss: the reference's measured loss plus the model's divergence from the reference.

    Raises what `score_against` does.
    """
    sums = score_against(reference, [model], tokens, token_bytes, spans, chosen, pieces)
    return replace(sums.reference, unit_nats=sums.reference.unit_nats + sums.divergences[0].unit_nats)


@torch.no_grad()
def target_values(
    reference: Any, models: Sequence[Any], tokens: np.ndarray, batch: list[Span]
) -> np.ndarray:  # (1 + 2·models, batch · scored) float64 nats
    """Return at each target the reference's loss, the models' losses, the models' divergences from the reference."""
    hidden, targets = scored_hidden(reference, tokens, batch)
    reference_log_probs = distribution(reference, hidden).float()
    losses, divergences = [-reference_log_probs.gather(-1, targets[:, None])[:, 0].double().cpu()], []
    for module in models:
        log_probs = distribution(module, scored_hidden(module, tokens, batch)[0]).float()
        if log_probs.shape != reference_log_probs.shape:
            raise MismatchError(
                f"the reference tells {reference_log_probs.shape[1]} tokens apart, another model {log_probs.shape[1]}",
                hint="--reference is the checkpoint that both were made from",
            )
        losses.append(-log_probs.gather(-1, targets[:, None])[:, 0].double().cpu())
        divergences.append(divergences_of(reference_log_probs, log_probs).double().cpu())
    return torch.stack([*losses, *divergences]).numpy()


# ---- for screening ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate in bpb, and half the width of its interval."""

    bpb: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.bpb) > self.half


def chance_of(surprises: np.ndarray, num_bytes: int, level: float) -> Interval:
    """Return the sum of windows' surprises in bits, (k,), as bpb, and how far from zero chance alone would take it."""
    half = float(stdtrit(len(surprises), 0.5 + level / 2)) * math.sqrt(math.fsum(surprises**2))
    return Interval(math.fsum(surprises) / num_bytes, half / num_bytes)


class ExpectedWindows:
    """A scorer of windows with two models by their divergence from a third, which keeps their losses too."""

    def __init__(
        self,
        reference: Any,  # LanguageModels, these three
        candidate: Any,
        control: Any,
        tokens: np.ndarray,  # (n,)
        token_bytes: np.ndarray,  # (n,)
        spans: list[Span],  # the text's N windows
    ) -> None:
        self.reference, self.models = reference, (candidate, control)
        self.tokens, self.token_bytes, self.spans = tokens, token_bytes, spans
        self.divergence_bits = np.zeros((2, len(spans)))  # of candidate and control, once scored
        self.measured_bits = np.zeros(len(spans))  # candidate's loss less control's, once scored
        self.drawn = np.zeros(len(spans), bool)

    def __call__(self, chosen: np.ndarray) -> tuple[Score, Score]:  # windows (k,) ascending
        """Return sums of both divergences over windows, in the place of nats. Raises what `score_against` does."""
        sums = score_against(self.reference, self.models, self.tokens, self.token_bytes, self.spans, chosen)
        for model, score in enumerate(sums.divergences):
            bits = score.unit_nats / math.log(2)
            self.divergence_bits[model, chosen] = np.bincount(np.searchsorted(chosen, score.window), bits)
        first, second = sums.losses
        self.measured_bits[chosen] = window_bits(first, second, chosen)
        self.drawn[chosen] = True
        candidate, control = sums.divergences
        return candidate, control

    def divergences(self, all_bytes: np.ndarray, level: float) -> tuple[Interval, Interval]:  # (N,) int64
        """Return the whole text's divergences from the reference; exact once every window is scored."""
        candidate, control = (self._interval(bits, all_bytes, level) for bits in self.divergence_bits)
        return candidate, control

    def measured(self, all_bytes: np.ndarray, level: float) -> Interval:
        """Return the difference in loss on the whole text, from the same windows; exact once every window is scored."""
        return self._interval(self.measured_bits, all_bytes, level)

    def surprise(self, all_bytes: np.ndarray, level: float) -> Interval:
        """Return the drawn windows' measured difference less the expected one, and how large it may be by chance."""
        bits = self.measured_bits - self.divergence_bits[0] + self.divergence_bits[1]
        return chance_of(bits[self.drawn], int(all_bytes[self.drawn].sum()), level)

    def _interval(self, bits: np.ndarray, all_bytes: np.ndarray, level: float) -> Interval:
        drawn = np.flatnonzero(self.drawn)
        bpb, error = estimate(bits[drawn], all_bytes[drawn], all_bytes)
        degrees = max(1, len(drawn) - 2)
        return Interval(bpb, float(stdtrit(degrees, 0.5 + level / 2)) * error)

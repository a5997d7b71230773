"""The choice of a size: every candidate's expected bpb at the budget's bytes after the budget's seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from pgolf_post.errors import MismatchError
from pgolf_post.sizing.law import LogLine, LossLaw

HEADER = (
    "size", "parameters", "µs/token", "tokens", "bits/weight", "bpb unquantized", "gap", "bpb expected", "± 95 %",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A size that could be trained."""

    name: str
    parameters: int  # of its size, without what its variant adds
    weights: int  # that rounding stores as symbols
    seconds_per_token: float
    start_seconds: float = 0.0  # of the run, before and beside its tokens
    variant: str | None = None  # of the recipe; None: the ladder's first
    token_bytes: float = 1.0  # mean text of a training token, where vocabularies differ
    all_parameters: int | None = None  # with what the variant adds


@dataclass(frozen=True)
class Laws:
    """Laws that the ladder was fitted by."""

    loss: LossLaw
    gap: LogLine  # bpb by bits a weight


@dataclass(frozen=True)
class Prediction:
    """A candidate's expectation."""

    candidate: Candidate
    tokens: float
    bits_per_weight: float
    loss: float  # bpb before rounding
    gap: float  # bpb
    half: float  # of the sum's 95 % interval

    @property
    def bpb(self) -> float:
        """Expected bpb after rounding."""
        return self.loss + self.gap

    def facts(self) -> dict[str, Any]:
        """Return the prediction as JSON."""
        own = {key: value for key, value in vars(self).items() if key != "candidate"}
        return {**vars(self.candidate), **own, "bpb": self.bpb}

    def cells(self) -> tuple[str, ...]:
        """Return the prediction as a row under HEADER."""
        one = self.candidate
        numbers = (
            f"{one.all_parameters or one.parameters:,}",
            f"{1e6 * one.seconds_per_token:,.2f}",
            f"{self.tokens:,.0f}",
        )
        bpb = f"{self.loss:.5f}", f"{self.gap:+.5f}", f"{self.bpb:.5f}", f"{self.half:.5f}"
        return one.name, *numbers, f"{self.bits_per_weight:.3f}", *bpb


def predict(candidate: Candidate, laws: Laws, budget_bytes: int, seconds: float, level: float = 0.95) -> Prediction:
    """Return what a candidate is expected to reach. Errors of the loss law and the gap's are independent.

    Raises MismatchError if the seconds do not hold the run's start.
    """
    tokens = (seconds - candidate.start_seconds) / candidate.seconds_per_token
    if tokens <= 0:
        raise MismatchError(f"{candidate.name}: a run starts for {candidate.start_seconds:.3g} s, of {seconds:g} s")
    bits = 8 * budget_bytes / candidate.weights
    gap = laws.gap(bits)
    place = candidate.parameters, tokens * candidate.token_bytes, candidate.variant
    variance = laws.loss.variance(*place) + gap**2 * laws.gap.log_variance(bits)
    half = float(stdtrit(laws.loss.degrees, (1 + level) / 2)) * math.sqrt(variance)
    return Prediction(candidate, tokens, bits, laws.loss(*place), gap, half)


def ranked(candidates: Sequence[Candidate], laws: Laws, budget_bytes: int, seconds: float) -> list[Prediction]:
    """Return all candidates, the lowest expected bpb first. Raises MismatchError if there is none."""
    if not candidates:
        raise MismatchError("no size to choose from", hint="add --size KEY=VALUE")
    return sorted((predict(one, laws, budget_bytes, seconds) for one in candidates), key=lambda found: found.bpb)


def remark(found: Sequence[Prediction]) -> str:
    """Return what the ranking does not say by itself: a best size at the ladder's end, or a tie."""
    best = found[0]
    if len(found) > 1 and best.half + found[1].half > found[1].bpb - best.bpb:
        return f"{best.candidate.name} and {found[1].candidate.name} lie within their intervals of each other"
    sizes = [one.candidate.parameters for one in found]
    ends = {min(sizes): "smallest", max(sizes): "largest"}
    if (end := ends.get(best.candidate.parameters)) is not None:
        return f"{best.candidate.name} is the {end} of the ladder: the best size may lie beyond it"
    return f"{best.candidate.name} is expected to be the best by more than both intervals"

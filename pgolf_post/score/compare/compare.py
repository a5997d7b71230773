"""Is A better than B? Paired by document, tested by seed as the challenge does, or screened until it is known.

Paired: the same documents under both, differences summed by document (paired.py), with a t interval, a bootstrap over
documents, and the sign test. Record: the challenge's rule over groups of seeds, a one-sided Welch test with the sample
standard deviation. Screening as little text as the question needs is in screen.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr
from scipy.stats import binomtest

from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.paired import Clusters, pair

RECORD_MARGIN_NATS = 0.005  # per token
RECORD_P = 0.01
BYTES_PER_TOKEN = {  # 151.08 M bytes of published validation text over its tokens
    "sp1024": 151.08e6 / 62_021_632,
    "sp4096": 151.08e6 / 45_508_608,
    "sp8192": 151.08e6 / 40_540_160,
    "caseops": 151.08e6 / 47_851_520,
}

# ---- paired ----------------------------------------------------------------------------------------------------------


def by_document(score: Score) -> Score:
    """The same sums with documents for windows, so that scores by different protocols can be paired."""
    count = len(score.document_nats)
    place = np.arange(count)
    sums = score.document_nats, score.document_tokens, score.document_bytes
    present = np.flatnonzero(sums[1])  # documents that hold a scored token
    nats, tokens, text_bytes = (array[present] for array in sums)
    return Score(place[present], place[present], place[present], nats, tokens, text_bytes, score.seconds)


def paired_documents(candidate: Score, control: Score) -> Clusters:
    """Differences by document. Raises MismatchError if the two did not score the same tokens."""
    first, second = by_document(candidate), by_document(control)
    if len(first.window) != len(second.window) or not np.array_equal(first.unit_tokens, second.unit_tokens):
        raise MismatchError(
            f"the two scores are of different text: {candidate.tokens:,} tokens in {len(first.window):,} documents, "
            f"{control.tokens:,} in {len(second.window):,}",
            hint="score both with the same --max-tokens, --tail and, where the tail is dropped, the same --seq-len",
        )
    return pair(first, second)


@dataclass(frozen=True)
class SignTest:
    """In how many documents the candidate is better, and how likely that is by chance, two-sided."""

    better: int
    worse: int
    p: float


def sign_test(clusters: Clusters) -> SignTest:
    """The sign test over clusters; ties do not count."""
    better, worse = int((clusters.bits < 0).sum()), int((clusters.bits > 0).sum())
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return SignTest(better, worse, p)


# ---- the record rule -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welch:
    """A one-sided Welch t-test that the candidate's mean is lower by more than a margin."""

    difference: float  # candidate's mean minus control's
    margin: float
    t: float
    degrees: float
    p: float


def welch(candidate: np.ndarray, control: np.ndarray, margin: float = 0.0) -> Welch:
    """Welch's test of mean(candidate) < mean(control) - margin, sample standard deviations (n - 1).

    Raises MismatchError for a group of fewer than two, or two groups without any spread.
    """
    for name, group in (("candidate", candidate), ("control", control)):
        if len(group) < 2:
            raise MismatchError(f"the {name} has {len(group)} run; a spread needs two, the challenge asks for three")
    shares = candidate.var(ddof=1) / len(candidate), control.var(ddof=1) / len(control)
    if sum(shares) == 0:
        raise MismatchError("both groups are without any spread: these are not different seeds")
    difference = float(candidate.mean() - control.mean())
    degrees = sum(shares) ** 2 / (shares[0] ** 2 / (len(candidate) - 1) + shares[1] ** 2 / (len(control) - 1))
    t = (difference + margin) / math.sqrt(sum(shares))
    return Welch(difference, margin, float(t), float(degrees), float(stdtr(degrees, t)))


@dataclass(frozen=True)
class RecordVerdict:
    """The challenge's rule: README (by 0.005 nats per token at p < 0.01) and leaderboard practice (p against zero)."""

    against_zero: Welch
    against_margin: Welch
    bytes_per_token: float
    enough_seeds: bool

    @property
    def is_record(self) -> bool:
        """By at least the margin, at p < 0.01, with three seeds each."""
        reached = self.against_zero.difference <= -self.against_margin.margin
        return reached and self.against_zero.p < RECORD_P and self.enough_seeds

    def facts(self) -> dict[str, Any]:
        zero, margin = self.against_zero, self.against_margin
        return {
            "difference_bpb": zero.difference,
            "difference_nats": zero.difference * math.log(2) * self.bytes_per_token,
            "t": zero.t,
            "degrees": zero.degrees,
            "p": zero.p,
            "margin_bpb": margin.margin,
            "p_margin": margin.p,
            "enough_seeds": self.enough_seeds,
            "record": self.is_record,
        }


def record_rule(candidate: np.ndarray, control: np.ndarray, bytes_per_token: float) -> RecordVerdict:
    """Apply the rule to bpb of seeds, each (seeds,)."""
    margin = RECORD_MARGIN_NATS / math.log(2) / bytes_per_token
    enough = min(len(candidate), len(control)) >= 3
    return RecordVerdict(welch(candidate, control), welch(candidate, control, margin), bytes_per_token, enough)

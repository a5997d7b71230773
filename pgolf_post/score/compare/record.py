"""The challenge's record rule over groups of seeds: a one-sided Welch test with the sample standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr

from pgolf_post.errors import MismatchError

RECORD_MARGIN_NATS = 0.005  # per token
RECORD_P = 0.01
RECORD_SEEDS = 3
BYTES_PER_TOKEN = {  # 151.08 M bytes of published validation text over its tokens
    "sp1024": 151.08e6 / 62_021_632,
    "sp4096": 151.08e6 / 45_508_608,
    "sp8192": 151.08e6 / 40_540_160,
    "caseops": 151.08e6 / 47_851_520,
}


@dataclass(frozen=True)
class Welch:
    """A one-sided Welch t-test that the candidate's mean is lower by more than a margin."""

    difference: float  # candidate's mean minus control's
    margin: float
    t: float
    degrees: float
    p: float


def welch(candidate: np.ndarray, control: np.ndarray, margin: float = 0.0) -> Welch:
    """Return Welch's test of mean(candidate) < mean(control) - margin, sample standard deviations (n - 1).

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
        """Whether it is better by at least the margin, at p < 0.01, with three seeds each."""
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
    """Apply the rule to bpb of seeds, (seeds,) each. Raises what `welch` does."""
    margin = RECORD_MARGIN_NATS / math.log(2) / bytes_per_token
    enough = min(len(candidate), len(control)) >= RECORD_SEEDS
    return RecordVerdict(welch(candidate, control), welch(candidate, control, margin), bytes_per_token, enough)

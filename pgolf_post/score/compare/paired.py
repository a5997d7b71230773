"""Differences between two scores of the same text, with error bars clustered by document.

Two models' losses on the same words rise and fall together, so their difference is known far better than either. What
is independent is the document (or a piece of it), not the window and not the token: the windows of one document share
its subject. So units are summed into clusters, and only clusters count as observations.

    Δbpb = Σ_c D_c / Σ_c B_c,   D_c = Σ (candidate's nats - control's) / ln 2,   B_c = bytes of cluster c

a ratio of sums, as bpb itself is. Its variance is the delete-one-cluster jackknife, (G-1)/G · Σ_c (Δ without c - Δ)²
(the cluster-robust CR3 of MacKinnon, Nielsen & Webb 2023, arXiv 2205.03285), which stays honest with few and unequal
clusters; its t distribution has as many degrees of freedom as equal clusters would that are as unequal as these (Kish
1965). The bootstrap over clusters is the second opinion. Negative differences: the candidate is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score

BOOTSTRAP_CELLS = 1 << 22  # drawn at once: samples × clusters

ClusterBy = Literal["document", "piece", "window"]


@dataclass(frozen=True)
class Clusters:
    """A paired difference, summed by cluster."""

    bits: np.ndarray  # (clusters,) float64, candidate's minus control's
    bytes: np.ndarray  # (clusters,) int64
    units: int
    tokens: int
    unit_variance: float  # of the difference in bpb, were all units independent

    @property
    def bpb(self) -> float:
        """The difference in bits per byte."""
        return math.fsum(self.bits) / int(self.bytes.sum())


@dataclass(frozen=True)
class Difference:
    """A difference in bpb (candidate - control) and its confidence interval; infinite where nothing can be said."""

    bpb: float
    low: float
    high: float
    level: float  # for example 0.95
    clusters: int
    effective_clusters: float  # as many equal ones say as much
    effective_units: float  # as many independent units say as much
    tokens: int

    @property
    def better(self) -> bool:
        """Whether the interval excludes that the candidate is no better."""
        return self.high < 0

    @property
    def worse(self) -> bool:
        return self.low > 0

    def facts(self) -> dict[str, Any]:
        """Return JSON facts; null for an infinite bound."""
        bounds = {name: value if math.isfinite(value) else None for name, value in self._bounds().items()}
        counts = {"clusters": self.clusters, "tokens": self.tokens}
        effective = {"effective_clusters": self.effective_clusters, "effective_units": self.effective_units}
        return {"difference_bpb": self.bpb, **bounds, "level": self.level, **counts, **effective}

    def _bounds(self) -> dict[str, float]:
        return {"low_bpb": self.low, "high_bpb": self.high}


def pair(candidate: Score, control: Score, by: ClusterBy = "document") -> Clusters:
    """Return the difference of two scores on the windows that both have, summed by cluster.

    Raises MismatchError if they share no window, or if a shared one does not hold the same text in both.
    """
    first, second = _shared(candidate, control), _shared(control, candidate)
    require_same_text(candidate, control, first, second)
    bits = (candidate.unit_nats[first] - control.unit_nats[second]) / math.log(2)
    weight = candidate.unit_bytes[first]
    _, cluster = np.unique(getattr(candidate, by)[first], return_inverse=True)
    ratio = math.fsum(bits) / int(weight.sum())
    count = len(bits)
    unit_variance = float(np.square(bits - ratio * weight).sum()) * count / max(1, count - 1) / int(weight.sum()) ** 2
    sums = np.bincount(cluster, bits), np.bincount(cluster, weight).astype(np.int64)
    return Clusters(*sums, count, int(candidate.unit_tokens[first].sum()), unit_variance)


def _shared(score: Score, other: Score) -> np.ndarray:  # int64: units of windows in both, ordered by window
    places = np.flatnonzero(np.isin(score.window, other.window))
    return places[np.argsort(score.window[places], kind="stable")]


def require_same_text(
    candidate: Score,
    control: Score,
    first: np.ndarray,  # (k,) units of the candidate
    second: np.ndarray,  # (k,) of the control
) -> None:
    """Raise MismatchError unless units hold the same windows, documents, tokens and bytes in both scores."""
    if len(first) == 0:
        raise MismatchError("two scores that share no window have no paired difference")
    for name in ("window", "document", "piece", "unit_tokens", "unit_bytes"):
        mine, theirs = getattr(candidate, name)[first], getattr(control, name)[second]
        if not np.array_equal(mine, theirs):
            place = int(np.argmax(mine != theirs)) if len(mine) == len(theirs) else min(len(mine), len(theirs)) - 1
            raise MismatchError(
                f"two scores are not of the same text: {name.removeprefix('unit_')} of unit {place} "
                f"(window {int(candidate.window[first][place])}) differs",
                hint="score both on the same data folder with the same protocol",
            )


def effective_clusters(weights: np.ndarray) -> float:
    """Return (Σ w)² / Σ w²: how many equal clusters are as good as these (Kish 1965)."""
    scaled = weights / weights.max()
    return float(scaled.sum() ** 2 / np.square(scaled).sum())


def jackknife_variance(clusters: Clusters) -> float:
    """Return the variance of Δbpb by leaving out one cluster at a time; infinite if one cluster holds everything."""
    count, rest = len(clusters.bytes), clusters.bytes.sum() - clusters.bytes
    if count < 2 or rest.min() == 0:
        return math.inf
    without = (math.fsum(clusters.bits) - clusters.bits) / rest
    return float((count - 1) / count * np.square(without - clusters.bpb).sum())


def t_interval(clusters: Clusters, level: float = 0.95) -> Difference:
    """Return the difference and its two-sided t interval."""
    effective = effective_clusters(clusters.bytes)
    variance = jackknife_variance(clusters)
    quantile = float(stdtrit(max(1.0, effective - 1), (1 + level) / 2))
    half = quantile * math.sqrt(variance)
    return _difference(clusters, clusters.bpb - half, clusters.bpb + half, level, variance)


def share_interval(own: Clusters, base: Clusters, level: float = 0.95) -> tuple[float, float, float]:
    """Return (share, low, high): Σ own bits / Σ base bits, one difference as a share of another, with its t interval.

    Both are of the same clusters, so what makes both large in the same documents cancels. Leaves out one cluster at a
    time, as `t_interval` does; infinite if that says nothing. Raises MismatchError for other clusters.
    """
    if not np.array_equal(own.bytes, base.bytes):
        raise MismatchError("the share of one difference in another needs both on the same text")
    share = math.fsum(own.bits) / math.fsum(base.bits)
    count, rest = len(own.bits), base.bits.sum() - base.bits
    if count < 2 or rest.min() <= 0:
        return share, -math.inf, math.inf
    without = (own.bits.sum() - own.bits) / rest
    error = math.sqrt((count - 1) / count * np.square(without - share).sum())
    half = float(stdtrit(max(1.0, effective_clusters(own.bytes) - 1), (1 + level) / 2)) * error
    return share, share - half, share + half


def bootstrap_interval(clusters: Clusters, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Difference:
    """Return the difference and its percentile interval over `samples` draws of the clusters with replacement."""
    count = len(clusters.bytes)
    if count < 2:
        return _difference(clusters, -math.inf, math.inf, level, math.inf)
    random = np.random.default_rng(seed)
    at_once = max(1, BOOTSTRAP_CELLS // count)
    ratios = []
    for start in range(0, samples, at_once):
        times = random.multinomial(count, np.full(count, 1 / count), size=min(at_once, samples - start))
        ratios.append((times @ clusters.bits) / np.maximum(times @ clusters.bytes, 1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return _difference(clusters, float(low), float(high), level, jackknife_variance(clusters))


def _difference(clusters: Clusters, low: float, high: float, level: float, variance: float) -> Difference:
    """Return a difference with the counts that go with it.

    `variance` is the clusters'; beside that of independent units it says how many of those the units are worth.
    """
    independent = clusters.unit_variance / variance if variance else 1.0
    effective = effective_clusters(clusters.bytes), clusters.units * min(1.0, independent)
    return Difference(clusters.bpb, low, high, level, len(clusters.bytes), *effective, clusters.tokens)

"""Test of the distributions: each sums to one over the vocabulary, and the scores are theirs."""

from __future__ import annotations

import numpy as np

from pgolf_post.data import BOS_ID
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.screening import RARE, needed_targets
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import Observer

SUM_TOLERANCE = 1e-4  # of a sum of probabilities, and in nats
MOST_NUMBERS = 2**31  # probabilities of one run that are looked at; beyond, targets are drawn


def watched_targets(
    log: CommitLog, order: np.ndarray, vocab_size: int, power: float, random: np.random.Generator
) -> np.ndarray:  # (k,) int64, ascending
    """Return the targets whose distributions are summed: all, or where the vocabulary is too large for that some.

    Those are the targets after every BOS, those that were predicted best, and an even draw.
    """
    most = MOST_NUMBERS // vocab_size
    if len(order) <= most:
        return np.sort(order)
    needed = max(needed_targets(power), most // 2)
    after_bos = order[log.tokens[order - 1] == BOS_ID]
    best = order[np.argsort(log.nats[order], kind="stable")][: most // 4]
    return np.unique(np.concatenate([after_bos, best, random.permutation(order)[:needed]]))


def sums_to_one(log: CommitLog, observer: Observer, order: np.ndarray) -> Finding:
    """Test that the distributions at watched targets sum to one, and that the nats are theirs."""
    shown = observer.shown
    if not len(shown):
        return Finding("sum to one", False, "the protocol showed no distribution")
    hidden = len(observer.watched) - len(shown)
    if hidden:
        return Finding("sum to one", False, f"{hidden:,} of {len(observer.watched):,} distributions were not shown")

    # a sum or a score that is no number is off by more than any tolerance
    off = np.nan_to_num(np.abs(observer.total[shown] - 1), nan=np.inf)
    gaps = np.nan_to_num(np.abs(-observer.own[shown] - log.nats[shown]), nan=np.inf)
    wrong = int(np.count_nonzero((off >= SUM_TOLERANCE) | (gaps >= SUM_TOLERANCE)))
    evidence = f"{len(shown):,} of {len(order):,} distributions: largest |Σp - 1| {off.max():.1g} (target "
    evidence += f"{int(shown[off.argmax()])}), largest gap to the score {gaps.max():.1g} nats"
    if wrong:
        return Finding("sum to one", False, f"{evidence}; {wrong:,} are off")
    power = "certain" if len(shown) == len(order) else f"p {1 - (1 - RARE) ** len(shown):.4f}"
    return Finding("sum to one", True, f"{evidence}; to find a fault on {RARE:.0%} of them: {power}")

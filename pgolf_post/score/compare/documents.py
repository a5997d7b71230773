"""Two scores paired by document, whatever their protocols: differences summed by document, and the sign test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.paired import Clusters, pair


def by_document(score: Score) -> Score:
    """Return a score's sums with documents for windows, so that scores by different protocols can be paired."""
    count = len(score.document_nats)
    place = np.arange(count)
    sums = score.document_nats, score.document_tokens, score.document_bytes
    present = np.flatnonzero(sums[1])  # documents that hold a scored token
    nats, tokens, text_bytes = (array[present] for array in sums)
    return Score(place[present], place[present], place[present], nats, tokens, text_bytes, score.seconds)


def paired_documents(candidate: Score, control: Score) -> Clusters:
    """Return differences summed by document. Raises MismatchError if the two did not score the same tokens."""
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
    """Two-sided sign test: the number of documents in which the candidate is better, and its probability by chance."""

    better: int
    worse: int
    p: float


def sign_test(clusters: Clusters) -> SignTest:
    """Return the sign test over clusters; ties do not count."""
    better, worse = int((clusters.bits < 0).sum()), int((clusters.bits > 0).sum())
    p = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))  # of p = 1/2 the two tails are alike
    return SignTest(better, worse, p)

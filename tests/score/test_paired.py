"""Paired differences: exact on what can be done by hand, honest about coverage, blind to nothing that differs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score, sum_units
from pgolf_post.score.compare.paired import (
    Clusters,
    bootstrap_interval,
    effective_clusters,
    pair,
    share_interval,
    t_interval,
)
from pgolf_post.score.compare.pieces import break_quality, cut_documents

LN2 = math.log(2)


def made_score(seed: int = 0, documents: int = 12, seq_len: int = 8, cut: bool = False) -> tuple[Score, np.ndarray]:
    """A score of random nats on a random text, and its per-target nats."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate([[BOS_ID, *random.integers(2, 50, random.integers(3, 60))] for _ in range(documents)])
    targets = np.arange(1, len(tokens))
    nats = random.gamma(2.0, 1.0, len(targets))
    token_bytes = np.where(tokens == BOS_ID, 0, 1 + tokens % 4)
    pieces = np.arange(len(tokens)) // 5 if cut else None
    return sum_units(tokens, targets, (targets - 1) // seq_len, nats, token_bytes, 0.0, pieces), nats


def shifted(score: Score, by: np.ndarray | float) -> Score:
    return replace(score, unit_nats=score.unit_nats + by)


@pytest.mark.parametrize("by", ["document", "piece", "window"])
def test_the_difference_is_that_of_the_bpbs(by: Any) -> None:
    control, _ = made_score(cut=True)
    candidate = shifted(control, np.random.default_rng(1).normal(size=len(control.unit_nats)))
    difference = t_interval(pair(candidate, control, by))
    assert difference.bpb == pytest.approx(candidate.bpb - control.bpb, abs=1e-12)
    assert difference.low < difference.bpb < difference.high
    assert difference.clusters == len(np.unique(getattr(control, by)))
    assert difference.tokens == control.tokens


def test_two_clusters_by_hand() -> None:
    clusters = Clusters(np.array([1.0, 3.0]), np.array([10, 10]), units=2, tokens=20, unit_variance=0.0)
    # leaving one out gives .3 and .1 around .2: variance ½ (.1² + .1²) = .01; t(1 degree) at 97.5 % = 12.7062
    interval = t_interval(clusters)
    assert interval.bpb == pytest.approx(0.2)
    assert interval.high - interval.bpb == pytest.approx(12.7062 * 0.1, rel=1e-4)


def test_a_score_and_itself_differ_by_exactly_nothing() -> None:
    score, _ = made_score()
    for interval in (t_interval(pair(score, score)), bootstrap_interval(pair(score, score))):
        assert (interval.bpb, interval.low, interval.high) == (0.0, 0.0, 0.0)
        assert not interval.better
        assert not interval.worse


def test_swapping_the_two_flips_the_sign() -> None:
    control, _ = made_score()
    candidate = shifted(control, np.random.default_rng(1).normal(0.1, 1, size=len(control.unit_nats)))
    there, back = t_interval(pair(candidate, control)), t_interval(pair(control, candidate))
    assert (back.bpb, back.low, back.high) == pytest.approx((-there.bpb, -there.high, -there.low))


def test_windows_of_a_document_do_not_count_as_independent() -> None:
    """A difference that is one number per document says no more in a thousand windows than in one."""
    control, _ = made_score(documents=40)
    per_document = np.random.default_rng(2).normal(size=40)
    candidate = shifted(control, per_document[control.document] * control.unit_bytes)
    by_document, by_window = (t_interval(pair(candidate, control, by)) for by in ("document", "window"))  # type: ignore[arg-type]
    assert by_document.high - by_document.low > 1.3 * (by_window.high - by_window.low)
    assert by_document.effective_units < 0.6 * len(control.unit_nats)


def test_equal_clusters_count_in_full_and_one_giant_counts_as_one() -> None:
    assert effective_clusters(np.full(20, 7)) == pytest.approx(20)
    assert effective_clusters(np.array([10**6, 1, 1, 1])) == pytest.approx(1, abs=1e-4)


def test_one_cluster_says_nothing() -> None:
    control, _ = made_score(documents=1)
    clusters = pair(shifted(control, 0.1), control)
    for interval in (t_interval(clusters), bootstrap_interval(clusters)):
        assert interval.low == -math.inf
        assert interval.facts()["high_bpb"] is None


def simulated(random: np.random.Generator, clusters: int, truth: float) -> Clusters:
    """Clusters of very unequal size, each with its own effect beside the common one."""
    sizes = np.ceil(random.lognormal(6, 1.2, clusters)).astype(np.int64)
    effect = truth + random.normal(0, 0.01, clusters)
    return Clusters(effect * sizes + random.normal(0, 0.3, clusters) * np.sqrt(sizes), sizes, clusters, 0, 0.0)


@pytest.mark.parametrize("clusters", [20, 130])
def test_intervals_cover_as_often_as_they_say(clusters: int) -> None:
    random, runs, truth = np.random.default_rng(3), 600, -0.003
    drawn = [simulated(random, clusters, truth) for _ in range(runs)]
    hit = [interval.low <= truth <= interval.high for interval in map(t_interval, drawn)]
    assert 0.93 <= np.mean(hit) <= 0.99
    resampled = [bootstrap_interval(sample, samples=400, seed=1) for sample in drawn[:200]]
    assert 0.85 <= np.mean([interval.low <= truth <= interval.high for interval in resampled]) <= 0.99


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    clusters = simulated(np.random.default_rng(4), 50, 0.0)
    first, again, other = (bootstrap_interval(clusters, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.low != other.low
    assert first.high - first.low == pytest.approx(t_interval(clusters).high - t_interval(clusters).low, rel=0.4)


def test_only_windows_that_both_have_are_compared() -> None:
    control, _ = made_score()
    candidate = shifted(control, 0.2)
    keep = control.window % 3 == 0
    fields = ("window", "document", "piece", "unit_nats", "unit_tokens", "unit_bytes")
    part = replace(candidate, **{name: getattr(candidate, name)[keep][::1] for name in fields})
    clusters = pair(part, control)
    assert clusters.units == int(keep.sum())
    expected = 0.2 / LN2 * keep.sum() / control.unit_bytes[keep].sum()
    assert clusters.bpb == pytest.approx(expected)
    nothing = replace(part, window=part.window + 10_000)
    with pytest.raises(MismatchError, match="share no window"):
        pair(nothing, control)


def test_scores_of_different_text_are_refused() -> None:
    control, _ = made_score()
    other = replace(control, unit_bytes=control.unit_bytes + (np.arange(len(control.unit_bytes)) == 5))
    with pytest.raises(MismatchError, match=r"bytes of unit 5 \(window \d+\) differs"):
        pair(other, control)


def test_documents_are_cut_at_blank_lines_into_pieces_of_limited_size(pico_data: DataFolder) -> None:
    text = "\n\n".join(f"the model keeps {i} bits;\nevery token drops {i * i} bits;" for i in range(12))
    ids = pico_data.tokenizer.encode(text)
    tokens = np.array([BOS_ID, *ids, BOS_ID, *ids[: len(ids) // 3]], dtype=np.uint16)
    previous = np.concatenate([tokens[:1], tokens[:-1]])
    token_bytes = pico_data.byte_table.count(previous, tokens)
    pieces = cut_documents(pico_data, tokens, token_bytes, 200)
    assert np.bincount(pieces, token_bytes).max() <= 200
    quality = break_quality(pico_data.tokenizer, tokens)
    inner = [place for place in np.flatnonzero(np.diff(pieces)) if tokens[place + 1] != BOS_ID]
    assert inner
    assert all(quality[place] == 2 for place in inner)
    second = len(ids) + 1
    assert pieces[second] == pieces[second - 1] + 1  # a piece never spans documents
    whole = cut_documents(pico_data, tokens, token_bytes, 10**9)
    assert whole.tolist() == [0] * second + [1] * (len(tokens) - second)
    tiny = cut_documents(pico_data, tokens, token_bytes, 1)
    assert np.all(np.diff(tiny) <= 1)
    assert int((quality[:second] == 2).sum()) == 11  # each blank line is found once


def clusters_of(bits: np.ndarray, sizes: np.ndarray) -> Clusters:
    return Clusters(bits, sizes, units=len(bits), tokens=int(sizes.sum()), unit_variance=0.0)


def test_a_share_knows_what_makes_both_differences_large() -> None:
    random = np.random.default_rng(4)
    sizes = random.integers(100, 1000, 60)
    base = sizes * random.gamma(2.0, 1.0, 60)  # documents that lose little and documents that lose much
    share, low, high = share_interval(clusters_of(0.3 * base, sizes), clusters_of(base, sizes))
    assert (share, low, high) == pytest.approx((0.3, 0.3, 0.3), abs=1e-9)
    apart = t_interval(clusters_of(0.3 * base, sizes)).high / t_interval(clusters_of(base, sizes)).bpb
    assert apart > 0.33  # what is said without pairing


def test_a_share_is_covered_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        sizes = random.integers(500, 1000, 60)
        base = sizes * random.gamma(4.0, 1.0, 60)
        own = 0.3 * base + sizes * random.normal(0, 0.8, 60)
        _, low, high = share_interval(clusters_of(own, sizes), clusters_of(base, sizes))
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_shares_of_other_texts_are_refused_and_one_document_says_nothing() -> None:
    one = clusters_of(np.array([1.0]), np.array([10]))
    assert share_interval(one, one) == (1.0, -math.inf, math.inf)
    with pytest.raises(MismatchError, match="both on the same text"):
        share_interval(one, clusters_of(np.array([1.0]), np.array([11])))

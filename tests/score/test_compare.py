"""Comparisons: the published Welch numbers, pairs across protocols, and a sequence that survives being looked at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pgolf_post.errors import MismatchError
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.documents import paired_documents, sign_test
from pgolf_post.score.compare.estimate import estimate
from pgolf_post.score.compare.paired import Clusters, t_interval
from pgolf_post.score.compare.record import BYTES_PER_TOKEN, record_rule, welch
from pgolf_post.score.compare.screen import EXCLUDED, Screening, ScreenSettings, screen, sequence_factor
from pgolf_post.score.compare.windows import bytes_of_windows, window_scorer
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import protocol_spans
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.spans import num_targets
from tests.score.conftest import Bench, record_model, ttt


def test_the_published_welch_numbers() -> None:
    new = np.array([1.1150812, 1.11437394, 1.11475014])
    old = np.array([1.11922988, 1.12002032, 1.11888882])
    test = welch(new, old)
    assert test.t == pytest.approx(-11.83, abs=0.005)
    assert test.degrees == pytest.approx(3.31, abs=0.005)
    assert round(test.p, 4) == 0.0004
    test = welch(np.array([1.07928348, 1.07996676, 1.08024795]), np.array([1.08079, 1.08103, 1.08118]))
    assert test.p == pytest.approx(
        0.0207, abs=4e-4
    )  # published from unrounded runs; these five digits allow .0201-.0207


@pytest.mark.parametrize(("variant", "margin"), [("sp1024", 0.00296), ("sp8192", 0.00194), ("caseops", 0.00228)])
def test_the_margin_in_bpb(variant: str, margin: float) -> None:
    groups = np.array([1.0, 1.1, 1.2]), np.array([1.3, 1.4, 1.5])
    assert record_rule(*groups, BYTES_PER_TOKEN[variant]).against_margin.margin == pytest.approx(margin, abs=6e-6)


def test_the_record_rule() -> None:
    old = np.array([1.1000, 1.1002, 1.1001])
    ratio = BYTES_PER_TOKEN["sp1024"]
    verdict = record_rule(old - 0.0040, old, ratio)
    assert verdict.is_record
    assert verdict.against_margin.p < 0.01
    assert not record_rule(old - 0.0020, old, ratio).is_record  # significant, but by less than the margin
    assert record_rule(old - 0.0020, old, ratio).against_zero.p < 0.01
    assert not record_rule(old[:2] - 0.0040, old, ratio).is_record  # two seeds
    noisy = np.array([1.05, 1.10, 1.13])
    assert not record_rule(noisy, old, ratio).is_record
    with pytest.raises(MismatchError, match="has 1 run"):
        record_rule(old[:1], old, ratio)
    with pytest.raises(MismatchError, match="without any spread"):
        record_rule(np.ones(3), np.ones(3), ratio)


def test_scores_by_different_protocols_are_paired_by_document(bench: Bench) -> None:
    plain = bench.score(PlainProtocol(seq_len=32, tail="score"))
    for protocol in (SlidingProtocol(seq_len=32, stride=8, tail="score"), ttt("lora")):
        other = bench.score(protocol)
        clusters = paired_documents(other, plain)
        assert clusters.bpb == pytest.approx(other.bpb - plain.bpb, abs=1e-12)
        assert t_interval(clusters).clusters == len(np.unique(plain.document))
    short = bench.score(PlainProtocol(seq_len=32, tail="drop"))
    with pytest.raises(MismatchError, match="different text"):
        paired_documents(short, plain)


def test_the_sign_test() -> None:
    def signs(better: int, worse: int) -> float:
        bits = np.array([-1.0] * better + [1.0] * worse + [0.0])
        return sign_test(Clusters(bits, np.ones(len(bits), dtype=np.int64), len(bits), 1, 0.0)).p

    assert signs(10, 0) == pytest.approx(2 / 1024)
    assert signs(5, 5) == 1.0
    assert signs(0, 0) == 1.0


# ---- screening -------------------------------------------------------------------------------------------------------


class Population:
    """A made-up text of windows, and two models that differ by a chosen amount, in some parts by more."""

    def __init__(self, random: np.random.Generator, windows: int, shift: float) -> None:
        self.bytes = random.integers(900, 1300, windows)
        subject = np.repeat(np.arange(windows), 3)[:windows]
        shared = random.standard_t(5, windows)[subject]  # neighbouring windows have a subject in common
        noise = random.standard_t(4, windows) * (1 + 2 * (random.random(windows) < 0.05))
        bits = (0.5 * shared + noise) * 2.0 + (self.bytes - 1100) / 50
        bits += self.bytes * (shift - bits.sum() / self.bytes.sum())  # over the whole text, exactly `shift`
        self.bits = bits

    def scores(self, chosen: np.ndarray) -> tuple[Score, Score]:
        places = chosen, chosen, chosen
        rest = np.full(len(chosen), 512), self.bytes[chosen]
        base = 700.0 + np.zeros(len(chosen))
        return tuple(  # type: ignore[return-value]
            Score(*places, nats, *rest, 0.0) for nats in (base + math.log(2) * self.bits[chosen], base)
        )


def screened(population: Population, seed: int, **settings: Any) -> Screening:
    chosen = ScreenSettings(seed=seed, **{"look_every": 8, **settings})
    return screen(population.scores, population.bytes, len(population.bytes) * 512, chosen, quiet=True)


def errors(runs: int, shift: float, half_width: float, seed: int) -> tuple[float, float, float]:
    """Shares of runs that excluded zero and that reported an interval without the truth; the median share of text."""
    random = np.random.default_rng(seed)
    wrong = missed = 0
    used = []
    for run in range(runs):
        screening = screened(Population(random, 600, shift), run, half_width_bpb=half_width)
        wrong += screening.reason == EXCLUDED or not screening.low <= 0 <= screening.high
        missed += not screening.low - 1e-12 <= shift <= screening.high + 1e-12
        used.append(screening.last.windows / 600)
    return wrong / runs, missed / runs, float(np.median(used))


def test_looking_often_does_not_invent_differences() -> None:
    for half_width in (1e-9, 0.0004):
        wrong, missed, _ = errors(60, 0.0, half_width, seed=1)
        assert max(wrong, missed) <= 0.06


@pytest.mark.long
@pytest.mark.parametrize("half_width", [1e-9, 0.0002, 0.0003, 0.0004, 0.0006])  # all of the text … 70 windows
def test_a_thousand_comparisons_of_a_model_with_its_equal_err_in_at_most_six_percent(half_width: float) -> None:
    wrong, missed, _ = errors(1000, 0.0, half_width, seed=2)
    assert wrong <= 0.06
    assert missed <= 0.06


@pytest.mark.long
def test_a_thousand_differences_are_covered() -> None:
    for shift in (-0.0005, 0.001, 0.01):
        _, missed, _ = errors(1000, shift, 0.0003, seed=3)
        assert missed <= 0.06


def test_a_difference_is_found_early_and_covered() -> None:
    random = np.random.default_rng(5)
    shares = []
    for run in range(20):
        screening = screened(Population(random, 600, -0.002), run, half_width_bpb=1e-9)
        assert screening.reason == EXCLUDED
        assert screening.low <= -0.002 <= screening.high < 0
        shares.append(screening.last.tokens / screening.total_tokens)
    assert np.median(shares) < 0.5


def test_it_stops_as_soon_as_the_difference_is_known_well_enough() -> None:
    population = Population(np.random.default_rng(6), 600, 0.0)
    screening = screened(population, 0, half_width_bpb=0.0004)
    assert screening.reason == "known to ±0.0004"
    assert screening.half == screening.last.half <= 0.0004
    assert all(some.half > 0.0004 for some in screening.looks[:-1])
    assert all(some.half == math.inf for some in screening.looks if some.windows < 64)
    wider = screened(population, 0, half_width_bpb=0.0008, stop_at_zero=False)
    assert wider.last.windows < screening.last.windows
    assert wider.last.half_always == math.inf


def test_the_sequence_is_wider_than_an_interval_and_ends_at_nothing() -> None:
    assert sequence_factor(100, 0.05, 100) == pytest.approx(2.9, abs=0.3)  # 1.96 would be valid for one look
    assert all(sequence_factor(t, 0.05, 100) > 2.5 for t in (10, 50, 100, 1000, 10_000))
    population = Population(np.random.default_rng(3), 200, 0.0)
    screening = screened(population, 0, half_width_bpb=1e-9, stop_at_zero=False)
    assert screening.half == 1e-9
    assert screening.reason == "all windows are scored"
    assert screening.last.bpb == pytest.approx(0.0, abs=1e-12)
    late = [some for some in screened(population, 1, half_width_bpb=1e-9).looks if 64 <= some.windows < 200]
    assert all(some.half_always > 1.3 * some.half for some in late)


def test_known_bytes_take_out_what_they_explain() -> None:
    random = np.random.default_rng(7)
    size = random.integers(500, 1500, 400)
    bits = 0.003 * size - 2.0  # nothing but a line: a few windows tell all
    drawn = random.permutation(400)[:10]
    estimated, error = estimate(bits[drawn], size[drawn], size)
    assert estimated == pytest.approx(bits.sum() / size.sum(), rel=1e-9)
    assert error < 1e-12
    noisy = bits + random.normal(0, 0.5, 400)
    truth = noisy.sum() / size.sum()
    off = []
    for _ in range(400):
        drawn = random.permutation(400)[:100]
        estimated, error = estimate(noisy[drawn], size[drawn], size)
        off.append((estimated - truth) / error)
    assert np.std(off) == pytest.approx(1.0, abs=0.12)  # the standard error is one
    assert estimate(noisy, size, size) == (pytest.approx(truth, abs=1e-15), 0.0)
    alike = np.full(400, 1000)
    assert estimate(noisy[:50], alike[:50], alike)[0] == pytest.approx(noisy[:50].mean() / 1000)


def test_screening_real_models(bench: Bench) -> None:
    other = record_model(seed=0)
    other.skip_weights.mul_(1.3)
    spans = protocol_spans(PlainProtocol(seq_len=4), num_targets(len(bench.tokens), 4, "drop"))
    scorer = window_scorer(other, bench.module, bench.tokens, bench.token_bytes, spans)
    all_bytes = bytes_of_windows(spans, bench.token_bytes)
    assert all_bytes.sum() == bench.token_bytes[1 : 4 * len(spans) + 1].sum()
    settings = ScreenSettings(half_width_bpb=1e-9, stop_at_zero=False, look_every=16)
    screening = screen(scorer, all_bytes, 4 * len(spans), settings)
    control = bench.score(PlainProtocol(seq_len=4)).bpb
    bench.module = other
    assert screening.last.bpb == pytest.approx(bench.score(PlainProtocol(seq_len=4)).bpb - control, abs=1e-6)
    assert screening.facts()["share"] == 1.0
    few = screen(scorer, all_bytes[:2], 8, settings)
    assert few.reason == "all windows are scored"

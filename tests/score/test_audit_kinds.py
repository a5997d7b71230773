"""The audit judges by what the log of commits tells, and finds faults that are rare, whatever its seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pgolf_post.score.audit.behaviour import audit_behaviour
from pgolf_post.score.audit.causality import Audited, Baseline, Run, rewritten, scoring_order, truncation
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.screening import LEAST_SPACING, Plan, needed_targets, pack, plan_screening, suspicion
from pgolf_post.score.audit.sums import sums_to_one, watched_targets
from pgolf_post.score.commits import CommitError, CommitLog, ScoreOnceError
from pgolf_post.score.nats import Observer
from pgolf_post.score.plain import PlainProtocol
from tests.score import audited_runs as runs

PLAIN = PlainProtocol(seq_len=runs.WINDOW, tail="score")
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))]


TOKENS = runs.text()


def audited(run: Run, seed: int = 0, power: float = 0.99) -> dict[str, Finding]:
    """Test → finding, of a protocol of one's own."""
    subject = Audited(torch.nn.Linear(1, 1), False, PLAIN, run)
    return {finding.test: finding for finding in audit_behaviour(subject, TOKENS, 2, seed, power)}


def failures(findings: dict[str, Finding]) -> set[str]:
    return {test for test, finding in findings.items() if finding.passed is False}


# ---- honest protocols of other kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("handed_out", [True, False])
@pytest.mark.parametrize("order", ["first to last", "last to first", "shuffled"])
def test_documents_in_any_order_with_an_online_temperature_pass(order: str, handed_out: bool) -> None:
    run = runs.with_temperature(runs.parts_by_document, order, handed_out)
    findings = audited(run, power=0.5)
    assert not failures(findings), findings
    assert findings["score before update"].passed is (True if handed_out else None)
    cut_off = order == "first to last" and not handed_out
    assert ("cut off after" in findings["truncation"].evidence) is cut_off
    assert ("made a token" in findings["flip"].evidence) is (order == "first to last")


def test_windows_with_online_learning_pass() -> None:
    assert not failures(audited(runs.with_temperature(runs.parts_by_window, "first to last"), power=0.5))
    assert not failures(audited(runs.with_counts(), power=0.5))


def test_windows_in_any_order_pass_where_nothing_is_learned() -> None:
    """A window's first input is scored later then, but what reads it stands behind it in the text."""
    findings = audited(runs.in_windows("last to first"))
    assert not failures(findings), findings
    assert "not cut off: the text's end is not what is scored last" in findings["truncation"].evidence


def test_windows_that_read_what_is_scored_later_and_learn_fail_with_the_reason() -> None:
    """A token tunes the temperature of the one before it, whose distribution it was read for: a circle."""
    findings = audited(runs.with_temperature(runs.parts_by_window, "last to first"), power=0.5)
    assert "truncation" in failures(findings)
    assert "which is scored later: where something is learned" in findings["truncation"].evidence


def test_a_peek_is_no_honest_order() -> None:
    """Windows last to first with a peek: neither order excuses it."""
    honest = runs.in_windows("last to first")
    peeking = runs.changed_rows(runs.ahead_by(2, 5, 0))

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log, other = peeking(tokens, observer), honest(tokens, None)
        log.turn = other.turn
        return log

    assert {"flip", "truncation"} & failures(audited(run, power=0.5))


# ---- rare faults -----------------------------------------------------------------------------------------------------

PEEKS: dict[str, Callable[[int], runs.Rows]] = {
    "one target in a hundred": lambda seed: runs.boosted(runs.one_in(100, seed)),
    "one in a hundred, by little": lambda seed: runs.boosted(runs.one_in(100, seed), by=1e-3),
    "one token in a hundred": lambda seed: runs.boosted(lambda tokens, places: tokens[places] % 40 == 2 + seed),
    "after BOS": lambda seed: runs.boosted(runs.after_bos),
    "BOS": lambda seed: runs.boosted(runs.before_bos),
    "sharper when right": lambda seed: runs.sharpened_when_right(25, seed),
    "two ahead": lambda seed: runs.ahead_by(1, 100, seed),
    "ten ahead": lambda seed: runs.ahead_by(10, 100, seed),
    "twenty ahead": lambda seed: runs.ahead_by(20, 100, seed),
    "a hundred ahead": lambda seed: runs.ahead_by(100, 100, seed),
}


@pytest.mark.parametrize("peek", PEEKS)
def test_a_rare_peek_is_caught(peek: str) -> None:
    assert is_caught(peek, 0)


@pytest.mark.long
@pytest.mark.parametrize("peek", PEEKS)
def test_nine_in_ten_rare_peeks_are_caught(peek: str) -> None:
    """Each is with p 0.99 or more: two missed of ten would be a chance of 0.4 %."""
    assert sum(is_caught(peek, seed) for seed in range(10)) >= 9


def is_caught(peek: str, seed: int) -> bool:
    return bool({"flip", "truncation"} & failures(audited(runs.changed_rows(PEEKS[peek](seed)), seed)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("chosen", "total"), [(runs.after_bos, 1.3), (runs.one_in(100, 7), 1.3), (runs.one_in(490, 9), 1.0005)]
)
def test_rare_sums_are_caught(chosen: Callable[..., np.ndarray], total: float, seed: int) -> None:
    findings = audited(runs.changed_rows(runs.scaled(chosen, total)), seed, power=0.2)
    assert failures(findings) == {"sum to one"}


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_that_are_rarely_not_the_distributions_are_caught(seed: int) -> None:
    boost = runs.boosted(runs.one_in(100, seed))
    shown = audited(runs.changed_rows(boost, shown=False), seed, power=0.2)
    assert "sum to one" in failures(shown)
    assert "sum to one" in failures(audited(runs.rescored(runs.with_counts()), seed, power=0.2))


def test_a_target_committed_twice_fails_score_once() -> None:
    findings = audited(runs.committed_twice(77))
    assert failures(findings) == {"score once"}
    assert "target 77 would be scored twice" in findings["score once"].evidence
    log = CommitLog(TOKENS, 400)
    with pytest.raises(ScoreOnceError, match="target 9 would be scored twice"):
        log.commit(np.array([8, 9, 9]), np.ones(3))
    with pytest.raises(CommitError) as early:
        log.hand_out(1, 5)
    assert not isinstance(early.value, ScoreOnceError)


def test_targets_left_out_fail_score_once() -> None:
    honest = runs.with_counts()

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        short = honest(tokens[:401], observer)
        log = CommitLog(tokens, 400)
        log.nats[:401], log.turn[:401] = short.nats, short.turn
        return log

    findings = audited(run, power=0.2)
    assert "80 of the text's 480 are left out" in findings["score once"].evidence
    assert "score once" in failures(findings)


def test_distributions_that_are_not_shown_fail() -> None:
    honest = runs.with_counts()

    class Blind(Observer):
        def see(self, places: np.ndarray, log_probs: object) -> None:
            """Nothing."""

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        return honest(tokens, Blind(np.array([1])))

    assert "showed no distribution" in audited(run, power=0.2)["sum to one"].evidence
    log = CommitLog(TOKENS, 499)
    observer = Observer(np.arange(1, 500), TOKENS)
    honest_log = runs.with_counts()(TOKENS, observer)
    observer.total[17] = np.nan
    finding = sums_to_one(honest_log, observer, np.arange(1, 500))
    assert finding.passed is False
    assert "1 of 499 distributions were not shown" in finding.evidence
    assert not log.handed_out


# ---- power -----------------------------------------------------------------------------------------------------------


def test_the_power_is_stated() -> None:
    run = runs.changed_rows(lambda rows, tokens, places: rows)
    findings = audited(run)
    assert not failures(findings)
    assert "nothing moved before them; a fault on 1% of them is found with p 0.99" in findings["flip"].evidence
    assert "499 of 499 distributions" in findings["sum to one"].evidence
    assert "found with p 0.2" in audited(run, power=0.2)["flip"].evidence


@pytest.mark.parametrize(("learns", "weak"), [(False, None), (True, (4, 29))])
def test_the_power_is_that_of_each_distance(learns: bool, weak: tuple[int, int] | None) -> None:
    """Where runs settle, any distance is seen alike; where a model learns, less between screening and cuts."""
    plan = planned(runs.with_counts() if learns else runs.in_windows("first to last"))
    drawn = np.array(sorted(plan.rank[place] for place in plan.drawn))
    assert plan.seen(0) == len(plan.drawn) == 459
    assert plan.seen(500) == plan.cuts.max()  # whatever stands before a cut
    assert plan.seen(3) >= np.count_nonzero(drawn >= 3)
    if weak is None:
        assert plan.powers.min() >= 0.99 - 1e-3
        assert "however far ahead it looks" in plan.told(0.99)
        return
    below = np.flatnonzero(plan.powers < 0.989)
    assert below.min() == weak[0]
    assert abs(int(below.max()) - weak[1]) <= 2
    assert f"where it looks {below.min()} to {below.max()} tokens ahead with p 0.5" in plan.told(0.99)


def planned(run: Run) -> Plan:
    random = np.random.default_rng(0)
    log = run(TOKENS, None)
    subject = Audited(torch.nn.Linear(1, 1), False, PLAIN, run)
    return plan_screening(Baseline(subject, TOKENS, log, Observer(np.arange(1)), scoring_order(log)), 0.99, random)


def test_each_cut_sees_any_distance() -> None:
    """A cut alone finds a peek over it, and nothing of one that ends before it."""
    base = Baseline(*baseline(runs.changed_rows(runs.boosted(lambda tokens, places: places == 0))))
    assert truncation(base, np.array([100]), np.random.default_rng(0), lambda: None).passed
    far = runs.changed_rows(runs.ahead_by(60, 1000, 950))  # target 50 leans on token 110
    for cut, passed in ((48, True), (60, False), (109, False), (110, True)):
        finding = truncation(Baseline(*baseline(far)), np.array([cut]), np.random.default_rng(0), lambda: None)
        assert finding.passed is passed, cut


def baseline(run: Run) -> tuple[Audited, np.ndarray, CommitLog, Observer, np.ndarray]:
    observer = Observer(np.arange(1, 500), TOKENS)
    log = run(TOKENS, observer)
    return Audited(torch.nn.Linear(1, 1), False, PLAIN, run), TOKENS, log, observer, scoring_order(log)


def test_overwritten_tokens_are_all_others() -> None:
    places = np.arange(200, 500)
    changed = rewritten(TOKENS, places, np.random.default_rng(3))
    assert np.array_equal(changed != TOKENS, np.isin(np.arange(500), places) & (TOKENS != 1))
    assert set(changed.tolist()) <= set(TOKENS.tolist())


def test_what_moves_after_a_still_target_is_suspicious() -> None:
    still, usual = np.zeros(3), np.full(9, 0.1)
    assert suspicion(np.concatenate([usual, still]), False) == (0.0, np.inf)
    assert suspicion(np.concatenate([usual, still, [1e-6, 0.0]]), False) == (1e-6, np.inf)
    assert suspicion(np.array([0.0, 1e-6]), True) == (1e-6, np.inf)
    assert suspicion(np.concatenate([usual, [0.5]]), False) == (0.5, pytest.approx(5))


def test_needed_targets_have_a_rare_one_among_them() -> None:
    assert needed_targets(0.99) == 459
    assert 0.99**459 < 0.01 < 0.99**458
    assert needed_targets(0.0) == 0


def test_places_of_one_run_are_apart() -> None:
    runs_of = pack([5, 6, 90, 7, 200, 91], LEAST_SPACING)
    assert sorted(place for run in runs_of for place in run) == [5, 6, 7, 90, 91, 200]
    assert all(np.diff(run).min(initial=LEAST_SPACING) >= LEAST_SPACING for run in runs_of)
    assert len(runs_of) == 3


def test_of_a_vast_vocabulary_the_odd_targets_are_summed() -> None:
    log = runs.with_counts()(TOKENS, None)
    order = np.arange(1, 500)
    assert len(watched_targets(log, order, 320, 0.99, np.random.default_rng(0))) == 499
    some = watched_targets(log, order, 2**31 // 100, 0.2, np.random.default_rng(0))
    assert len(some) < 200
    after_bos = order[TOKENS[order - 1] == 1]
    assert set(after_bos.tolist()) <= set(some.tolist())
    assert int(order[np.argmin(log.nats[order])]) in some

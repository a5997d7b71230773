"""The laws of a ladder: known coefficients are recovered, what a ladder cannot say is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pgolf_post.errors import MismatchError
from pgolf_post.sizing.choose import Candidate, Laws, predict, ranked, remark
from pgolf_post.sizing.law import COEFFICIENTS, Observation, fit_gap, fit_loss

SIZES = (10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6)
LENGTHS = (30.0, 300.0)
TRUE = {"E": 1.1, "A": 0.3, "alpha": 0.35, "B": 0.4, "beta": 0.3}
N0 = math.exp(float(np.log(SIZES).mean()))


def ladder_of(noise: float = 0.0, seed: int = 0, **true: float) -> list[Observation]:
    """A ladder that a known law made: seconds a token are 1e-10 N, so that larger sizes see fewer tokens."""
    truth, random = {**TRUE, **true}, np.random.default_rng(seed)
    runs = [(size, round(seconds / (1e-10 * size)), seconds) for size in SIZES for seconds in LENGTHS]
    d0 = math.exp(float(np.mean([math.log(tokens) for _, tokens, _ in runs])))

    def loss(size: int, tokens: int) -> float:
        by_size, by_text = (size / N0) ** -truth["alpha"], (tokens / d0) ** -truth["beta"]
        return truth["E"] + truth["A"] * by_size + truth["B"] * by_text

    return [Observation(str(n), n, d, s, loss(n, d) + noise * float(random.standard_normal())) for n, d, s in runs]


def test_known_coefficients_are_recovered() -> None:
    law = fit_loss(ladder_of())
    assert {name: round(value, 4) for name, value in law.coefficients.items()} == TRUE
    assert law(3e6, 1e6) == pytest.approx(fit_loss(ladder_of(), {"alpha": 0.35, "beta": 0.3})(3e6, 1e6), abs=1e-6)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = fit_loss(ladder_of())
    at, held = (8e6, 4e6), {"alpha": 0.35, "beta": 0.3}
    hits = 0
    for seed in range(60):
        found = fit_loss(ladder_of(0.002, seed), held).predict(*at)
        hits += abs(found.value - truth(*at)) <= found.half
    assert 50 <= hits <= 60  # 57 of 60 expected; fewer than 50 once in 10,000 times


def test_a_prediction_further_out_is_less_sure() -> None:
    law = fit_loss(ladder_of(0.001, 3), {"alpha": 0.35, "beta": 0.3})
    inside, outside = (law.predict(4e6, tokens).half for tokens in (1e6, 1e9))
    assert 0 < inside < outside
    assert law.standard_error("alpha") == 0.0  # held


DAMAGE: dict[str, Callable[[list[Observation]], list[Observation]]] = {
    "2 sizes": lambda runs: [run for run in runs if run.parameters in SIZES[:2]],
    "no size of the ladder has runs of two lengths": lambda runs: runs[::2],
    "5 runs for 5 coefficients": lambda runs: runs[:5],
    "alpha = .*follow no power of their parameters": lambda runs: [replace(r, bpb=1 + 1e5 / r.tokens) for r in runs],
}


@pytest.mark.parametrize("words", DAMAGE)
def test_an_ill_posed_ladder_is_refused_by_name(words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        fit_loss(DAMAGE[words](ladder_of()))


def test_sizes_and_tokens_that_move_together_are_not_told_apart() -> None:
    together = [replace(run, tokens=20 * run.parameters) for run in ladder_of()]
    together = [replace(run, tokens=run.tokens + 1) if i % 2 else run for i, run in enumerate(together)]
    with pytest.raises(MismatchError, match=r"does not tell .* apart"):
        fit_loss(together, {"alpha": 0.3, "beta": 0.3})


def with_variant(shift: float, noise: float = 0.0) -> list[Observation]:
    """The ladder, and the same runs of a variant that loses so much more."""
    plain = [replace(run, variant="plain") for run in ladder_of(noise, 5)]
    return plain + [
        replace(run, variant="table", bpb=again.bpb + shift)
        for run, again in zip(plain, ladder_of(noise, 6), strict=True)
    ]


def test_a_variant_shifts_the_loss_by_a_constant_of_its_own() -> None:
    law = fit_loss(with_variant(-0.05))
    assert law.coefficients["shift of table"] == pytest.approx(-0.05, abs=1e-6)
    assert {name: round(law.coefficients[name], 4) for name in TRUE} == TRUE
    assert law(3e6, 1e6, "table") == pytest.approx(law(3e6, 1e6, "plain") - 0.05, abs=1e-6)
    assert law(3e6, 1e6) == law(3e6, 1e6, "plain")
    noisy = fit_loss(with_variant(-0.05, 0.002), {"alpha": 0.35, "beta": 0.3})
    assert noisy.standard_error("shift of table") > 0
    assert noisy.variance(4e6, 1e6, "table") > 0


def test_a_variant_wins_where_its_gain_is_worth_its_bytes() -> None:
    told = Laws(fit_loss(with_variant(-0.05)), laws().gap)
    plain = replace(candidate(SIZES[1]), variant="plain")
    table = replace(plain, name="table", variant="table", weights=2 * plain.weights)
    best = {b: ranked([plain, table], told, b, 3000.0)[0].candidate.name for b in (300_000, 10**7)}
    assert best == {300_000: plain.name, 10**7: "table"}


def test_text_counts_in_bytes_where_vocabularies_differ() -> None:
    """Half the tokens of twice the bytes are the same text: the law is the same one."""
    halved = [replace(run, tokens=run.tokens // 2, token_bytes=2.0) for run in ladder_of()]
    assert fit_loss(halved)(3e6, 1e6) == pytest.approx(fit_loss(ladder_of())(3e6, 1e6), abs=1e-5)


def test_the_gap_is_a_line_of_logarithms() -> None:
    bits = [2.0, 3.0, 4.0]
    gap = fit_gap(bits, [0.5 * math.exp(-1.7 * each) for each in bits])
    assert gap.slope == pytest.approx(-1.7)
    assert gap(2.5) == pytest.approx(0.5 * math.exp(-1.7 * 2.5))
    assert gap.log_variance(3.0) == pytest.approx(0.0, abs=1e-12)
    for wrong, words in (([0.1, 0.2, 0.3], "rises with bits"), ([0.1, 0.0, 0.0], "has no logarithm")):
        with pytest.raises(MismatchError, match=words):
            fit_gap(bits, wrong)
    with pytest.raises(MismatchError, match="at one rate alone"):
        fit_gap([3.0, 3.0], [0.1, 0.1])


def laws() -> Laws:
    """The laws of the exact ladder, with a gap of 0.5·exp(-1.7 b)."""
    gap = fit_gap([2.0, 3.0, 4.0], [0.5 * math.exp(-1.7 * b) for b in (2.0, 3.0, 4.0)])
    return Laws(fit_loss(ladder_of()), gap)


def candidate(size: int) -> Candidate:
    return Candidate(f"{size:,}", size, size, 1e-10 * size)


def test_the_best_size_minimises_loss_and_gap_together() -> None:
    told = laws()
    found = ranked([candidate(size) for size in SIZES], told, 2_000_000, 3000.0)
    assert [one.bpb for one in found] == sorted(one.bpb for one in found)
    for one in found:
        size = one.candidate.parameters
        assert one.bits_per_weight == 8 * 2_000_000 / size
        assert one.bpb == pytest.approx(told.loss(size, 3000.0 / (1e-10 * size)) + 0.5 * math.exp(-1.7 * 16e6 / size))
    # fewer bytes want a smaller model, more bytes a larger one
    best = [ranked([candidate(s) for s in SIZES], told, b, 3000.0)[0].candidate.parameters for b in (2 * 10**5, 10**8)]
    assert best[0] < best[1]


def test_the_remark_names_a_tie_and_an_end_of_the_ladder() -> None:
    told = laws()
    small = ranked([candidate(size) for size in SIZES], told, 10**5, 3000.0)
    assert "is the smallest of the ladder" in remark(small)
    wide: list[Any] = [replace(one, half=10.0) for one in small]
    assert "within their intervals" in remark(wide)
    assert predict(candidate(SIZES[0]), told, 10**5, 3000.0).facts()["bpb"] == pytest.approx(small[0].bpb)
    assert set(COEFFICIENTS) <= set(told.loss.facts())

"""`swa-blend --search --after-fit` and `ema-blend --after-fit`: what a shell sees."""

from __future__ import annotations

from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint

FEW = ("--search-tokens", 160, "--calibration-tokens", 256)


@pytest.mark.long
def test_a_search_after_fit_says_what_rounding_and_the_search_cost(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    words = ("swa-blend", "--search", "--last", 1, "--after-fit", 6000, *FEW, "--json")
    answer = pgolf(*words)
    assert answer.code == 0, answer.err
    search = answer.json["search"]
    after = search["after_fit"]
    assert (after["budget"], after["calibration_tokens"], after["trellis_states"]) == (6000, 256, 8)
    for row in search["candidates"]:
        one = after["averages"][row["name"]]
        assert row["bpb"] == pytest.approx(one["before_bpb"] + one["gap_bpb"], rel=1e-9)
        assert one["artifact_bytes"] <= 6000
        assert min(one[f"{step}_seconds"] for step in ("statistics", "fit", "scoring")) > 0
    winner = Checkpoint.open(answer.json["checkpoint"])
    assert winner.meta["search"]["after_fit"]["budget"] == 6000
    assert "after fit to 6,000 bytes" in answer.err
    assert "bytes of statistics and artifacts are kept" in answer.err


def test_options_after_fit_that_would_do_nothing_are_refused(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    for words, said in (
        (("swa-blend", "--after-fit", 6000), "--after-fit does nothing without --search"),
        (("swa-blend", "--search", "--calibration-tokens", 64), "--calibration-tokens does nothing without"),
        (("ema-blend", "--sigma", 0.1, "--calibration-tokens", 64), "--calibration-tokens does nothing without"),
        (("ema-blend", "--sigma", 0.1, "--search-tokens", 64), "--search-tokens does nothing without"),
        (("swa-blend", "--search", "--after-fit", 10**7), "there is nothing to solve"),
    ):
        answer = pgolf(*words)
        assert answer.code == 2
        assert said in " ".join(answer.err.split())

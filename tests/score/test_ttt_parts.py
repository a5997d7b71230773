"""Test-time training of models with many optional parts keeps its laws: a part that looks ahead would break them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.ttt.documents import find_documents
from pgolf_post.score.ttt.weights import weights_sha256
from tests.score.conftest import MANY_PARTS, Bench, plain_adapters, record_model, ttt

pytestmark = pytest.mark.slow


@pytest.fixture(params=MANY_PARTS)
def parts(request: pytest.FixtureRequest, bench: Bench) -> Bench:
    """The bench with a model of many parts."""
    return replace(bench, module=record_model(**MANY_PARTS[request.param]))


def test_no_later_token_moves_an_earlier_score(parts: Bench) -> None:
    place = 271
    other = replace(parts, tokens=parts.tokens.copy())
    other.tokens[place:] = np.where(parts.tokens[place:] == 1, 1, 7)  # documents begin where they did
    for protocol in (SlidingProtocol(seq_len=32, stride=8, tail="score"), ttt("sgd")):
        before, after = parts.log(protocol).nats, other.log(protocol).nats
        assert np.array_equal(before[:place], after[:place])
        assert not np.array_equal(before[place:], after[place:])


def test_chunks_of_a_document_learn_from_earlier_ones_alone(parts: Bench) -> None:
    protocol = ttt("lora")
    before = parts.log(protocol)
    text = max(find_documents(parts.tokens, before.num_targets), key=lambda each: each.targets)
    place = text.start + 36  # in the third chunk of 16
    other = replace(parts, tokens=parts.tokens.copy())
    other.tokens[place : text.stop] = 7
    after = other.log(protocol)
    outside = np.ones(len(parts.tokens), dtype=bool)
    outside[place : text.stop + 1] = False
    assert np.array_equal(before.nats[outside], after.nats[outside])
    assert not np.array_equal(before.nats, after.nats)


@pytest.mark.parametrize("method", ["sgd", "lora"])
def test_learning_acts_and_every_part_comes_back(parts: Bench, method: str) -> None:
    before = weights_sha256(parts.module)
    still = parts.log(ttt(method, "learning_rate=0.0"))
    moved = parts.log(ttt(method))
    assert not np.array_equal(still.nats, moved.nats)
    assert weights_sha256(parts.module) == before
    if method == "sgd":
        slid = parts.log(SlidingProtocol(seq_len=32, stride=16, tail="score"))
        assert still.nats.sum() == pytest.approx(slid.nats.sum(), rel=1e-6)


def test_adapters_that_add_nothing_are_the_plain_forward(parts: Bench) -> None:
    plain_adapters(parts)

"""Breakdown laws: the bins of every kind add up to the score, to the last bit, whatever the protocol."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.checkpoint import View
from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, VerificationError
from pgolf_post.score.bpb import Score
from pgolf_post.score.breakdown import KIND_NAMES
from pgolf_post.score.breakdown.details import Details
from pgolf_post.score.breakdown.difference import ScoreSums, bin_differences
from pgolf_post.score.breakdown.kinds import KINDS, Targets, _last_before
from pgolf_post.score.breakdown.report import bin_rows, difference_rows
from pgolf_post.score.breakdown.sums import FILE, Breakdown, break_down, share_out
from pgolf_post.score.breakdown.token_text import CLASSES, TokenText
from pgolf_post.score.compare.comparison import compare
from pgolf_post.score.nats import distribution
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import score_text
from pgolf_post.score.session import Session, StoppedError
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.stage import score
from tests.score.conftest import Bench, ttt

PROTOCOLS = {
    "plain": lambda: PlainProtocol(seq_len=32, tail="score"),
    "sliding": lambda: SlidingProtocol(seq_len=32, stride=8, tail="score"),
    "sgd": lambda: ttt("sgd", "chunk_tokens=256", "epochs=1", "stride=32", "train_batch_seqs=8"),
    "lora": lambda: ttt("lora"),
    "phased": lambda: ttt("phased"),
}


Detailed = tuple[Score, Breakdown, Details]
_made: dict[str, Detailed] = {}  # the bench is the same in every test: each protocol runs once


def detailed(bench: Bench, data: DataFolder, name: str) -> Detailed:
    """Score the bench's text with details, and break the score down. Do not change what is returned."""
    if name not in _made:
        details = Details()
        session = Session(details=details, quiet=True)
        text = bench.tokens, bench.token_bytes
        own, _ = score_text(bench.module, bench.family, *text, PROTOCOLS[name](), session)
        _made[name] = own, break_down(own, details, *text, data.tokenizer), details
    return _made[name]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_bins_of_each_kind_add_up_to_the_score_exactly(bench: Bench, pico_data: DataFolder, name: str) -> None:
    own, breakdown, _ = detailed(bench, pico_data, name)
    assert tuple(breakdown.kinds) == tuple(KINDS) == KIND_NAMES
    for cells in breakdown.kinds.values():
        assert math.fsum(cells.sums["nats"]) == own.nats
        by_document = np.bincount(cells.document, cells.sums["nats"], minlength=len(own.document_nats))
        assert np.array_equal(by_document, own.document_nats)
        bins = cells.of_bins()
        assert sum(one.tokens for one in bins) == own.tokens
        assert sum(one.bytes for one in bins) == own.bytes
        assert math.fsum(one.nats for one in bins) == pytest.approx(own.nats, rel=1e-15)
    if name in ("plain", "lora"):
        assert own.nats == bench.score(PROTOCOLS[name]()).nats  # noting changes no score


@given(st.data())
def test_a_documents_nats_are_shared_out_without_rest(data: st.DataObject) -> None:
    documents = data.draw(st.integers(1, 4))
    counts = data.draw(st.lists(st.integers(1, 9), min_size=documents, max_size=documents))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    document = np.repeat(np.arange(documents), counts)
    nats = random.exponential(size=len(document)) * 10.0 ** random.integers(-9, 6, len(document))
    wanted = np.array([sum(nats[document == one][::-1]) for one in range(documents)])  # rounded in another order
    shared = share_out(wanted, document, nats)
    assert np.array_equal(np.bincount(document, shared), wanted)
    assert np.array_equal(np.bincount(document[::-1], shared[::-1]), wanted)  # in any order
    np.testing.assert_allclose(shared, nats, rtol=0, atol=64 * float(np.spacing(wanted.max())))


def test_a_sum_that_is_not_the_scores_is_refused(bench: Bench, pico_data: DataFolder) -> None:
    own, _, details = detailed(bench, pico_data, "plain")
    details = copy.copy(details)
    details.places = details.places[:-1]
    details.nats = details.nats[:-1]
    with pytest.raises(VerificationError, match=r"of document \d+ hold"):
        break_down(own, details, bench.tokens, bench.token_bytes, pico_data.tokenizer)


# ---- what is noted ---------------------------------------------------------------------------------------------------


def test_the_details_are_those_of_the_models_distribution(bench: Bench, pico_data: DataFolder) -> None:
    _, _, details = detailed(bench, pico_data, "plain")
    tokens = torch.from_numpy(bench.tokens.astype(np.int64))
    hidden = bench.module.hidden(tokens[None, 32:64])[0]
    log_probs = distribution(bench.module, hidden).double()
    places = np.arange(33, 65)
    assert details.context[places].tolist() == list(range(1, 33))
    assert details.guess[places].tolist() == log_probs.argmax(dim=-1).tolist()
    np.testing.assert_allclose(details.confidence[places], log_probs.max(dim=-1).values.exp(), rtol=1e-5)
    order = log_probs.argsort(dim=-1, descending=True).tolist()
    assert details.rank[places].tolist() == [order[i].index(int(tokens[place])) for i, place in enumerate(places)]


@pytest.mark.parametrize(("name", "least"), [("sliding", 24), ("lora", 17)])
def test_the_context_is_the_windows(bench: Bench, pico_data: DataFolder, name: str, least: int) -> None:
    _, _, details = detailed(bench, pico_data, name)
    assert details.context[details.places].min() == 1
    assert details.context[details.places].max() == 32
    if name == "sliding":
        assert details.context[33:].min() > least
    else:  # a document's first chunk begins with its BOS; later chunks see up to a window
        starts = np.flatnonzero(bench.tokens == BOS_ID)
        inner = details.places[~np.isin(details.places, starts)]
        first = starts[np.searchsorted(starts, inner, side="right") - 1]
        offset = inner - first
        assert np.array_equal(details.context[inner][offset <= 32], offset[offset <= 32])
        assert details.context[inner][offset > 32].min() >= least


def test_a_stopped_pass_goes_on_with_its_details(bench: Bench, pico_data: DataFolder, tmp_path: Path) -> None:
    whole, breakdown, _ = detailed(bench, pico_data, "lora")
    partial = tmp_path / "pass.partial.safetensors"
    clock = PhaseTimes(1e9)
    calls = iter([False, False, False, True])
    clock.over_budget = lambda: next(calls)  # type: ignore[method-assign]
    text = bench.module, bench.family, bench.tokens, bench.token_bytes, PROTOCOLS["lora"]()
    with pytest.raises(StoppedError):
        score_text(*text, Session(clock, details=Details(), partial=partial, identity="x", quiet=True))
    details = Details()
    own, _ = score_text(*text, Session(details=details, partial=partial, identity="x", quiet=True))
    again = break_down(own, details, bench.tokens, bench.token_bytes, pico_data.tokenizer)
    assert own.nats == whole.nats
    for kind, cells in breakdown.kinds.items():
        assert cells.of_bins() == again.kinds[kind].of_bins()


class OtherRank:
    """Ranks of which one other exists: sums add what it noted."""

    device = torch.device("cpu")

    def __init__(self, other: Details) -> None:
        self.others = iter([other.context, other.guess, other.confidence, other.rank])

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor += torch.from_numpy(next(self.others))


def test_ranks_add_up_what_they_noted(bench: Bench, pico_data: DataFolder) -> None:
    _, breakdown, whole = detailed(bench, pico_data, "plain")
    mine, theirs = Details(), Details()
    for place in whole.places:  # each target is noted by one rank
        one = mine if place // 32 % 2 else theirs
        one.resize(len(bench.tokens))
        for name in ("context", "guess", "confidence", "rank"):
            getattr(one, name)[place] = getattr(whole, name)[place]
    log = bench.log(PROTOCOLS["plain"]())
    mine.close(log, OtherRank(theirs))  # type: ignore[arg-type]
    own = bench.score(PROTOCOLS["plain"]())
    again = break_down(own, mine, bench.tokens, bench.token_bytes, pico_data.tokenizer)
    for kind, cells in breakdown.kinds.items():
        assert cells.of_bins() == again.kinds[kind].of_bins()


# ---- bins ------------------------------------------------------------------------------------------------------------


def made(tokens: list[int], data: DataFolder, context: int = 1000, guess: int = 5) -> Targets:
    details = Details()
    details.resize(len(tokens))
    details.places = np.arange(1, len(tokens))
    details.context[1:] = np.minimum(np.arange(1, len(tokens)), context)
    details.guess[:] = guess
    details.confidence[:] = np.linspace(0, 1, len(tokens))
    details.nats = np.arange(1, len(tokens)).astype(float)
    return Targets(np.array(tokens), details, TokenText.from_tokenizer(data.tokenizer))


def binned(kind: str, targets: Targets) -> list[str]:
    bins, names = KINDS[kind].bins(targets)
    return [names[number] for number in bins]


def test_bins_of_a_made_text(pico_data: DataFolder) -> None:
    text = [BOS_ID, 10, 11, 10, 11, BOS_ID, 10, 11]
    targets = made(text, pico_data)
    new, seen, after = "new", "repeated", "repeated after the same token"
    assert binned("repeat", targets) == [new, new, seen, after, new, new, new]
    assert binned("document", targets) == ["1", "2-3", "2-3", "4-7", "0", "1", "2-3"]
    assert binned("position", targets) == ["1", "2-3", "2-3", "4-7", "4-7", "4-7", "4-7"]
    assert binned("position", made(text, pico_data, context=2))[2:] == ["2-3"] * 5
    assert binned("repeat", made(text, pico_data, context=2)) == [new, new, seen, seen, new, new, new]
    assert binned("calibration", targets)[0] == "10-20 %"
    assert binned("calibration", targets)[-1] == "90-100 %"
    edge = "document's edge"
    assert [binned("sentence", targets)[i] for i in (0, 4, 5)] == [edge, edge, edge]
    confused = binned("confusions", made(text, pico_data, guess=11))
    assert confused.count("right") == 3
    shown = targets.text.shown
    assert f"{shown[11]} for {shown[10]}" in confused


def test_confusions_beyond_the_costliest_are_one_bin(pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgolf_post.score.breakdown.kinds.CONFUSIONS", 1)
    targets = made([BOS_ID, 10, 11, 12, 11], pico_data)  # nats 1, 2, 3, 4
    shown = targets.text.shown
    assert binned("confusions", targets) == [
        "all other pairs",
        f"{shown[5]} for {shown[11]}",
        "all other pairs",
        f"{shown[5]} for {shown[11]}",
    ]


@given(st.lists(st.integers(0, 5), max_size=30))
def test_the_last_equal_key_before_each(keys: list[int]) -> None:
    expected = [max((j for j in range(i) if keys[j] == key), default=-1) for i, key in enumerate(keys)]
    assert _last_before(np.array(keys, dtype=np.int64)).tolist() == expected


def test_deciles_of_frequency_hold_like_shares(pico_data: DataFolder) -> None:
    tokens = pico_data.tokens("val")
    bins, names = KINDS["frequency"].bins(made(tokens.tolist(), pico_data))
    counts = np.bincount(tokens[1:])
    assert len(names) == 10
    assert np.bincount(bins, minlength=10).max() <= 0.1 * len(bins) + counts.max()
    lowest = [counts[tokens[1:][bins == one]].min() for one in np.unique(bins)]
    assert all(earlier >= later for earlier, later in pairwise(lowest))


def test_each_token_of_the_vocabulary_has_its_class(pico_data: DataFolder) -> None:
    tokenizer, text = pico_data.tokenizer, TokenText.from_tokenizer(pico_data.tokenizer)
    kind = {tokenizer.id_to_piece(i): CLASSES[text.token_class[i]] for i in range(tokenizer.vocab_size())}
    assert (kind["<s>"], kind["<0x41>"], kind["<unk>"]) == ("BOS", "byte fallback", "control")
    assert {kind[piece] for piece in kind if piece.startswith("▁") and piece[1:].isalpha()} == {"word start"}
    assert {kind[digit] for digit in "0123456789" if digit in kind} <= {"digits"}
    assert kind.get(";", "punctuation") == "punctuation"
    assert "continuation" in kind.values()


# ---- kept beside the score -------------------------------------------------------------------------------------------


def test_a_breakdown_is_kept_beside_the_score(view: View, pico_data: DataFolder) -> None:
    protocol = PlainProtocol(seq_len=16, max_tokens=200)
    without = score(view, pico_data, protocol)
    with pytest.raises(NotFoundError, match="without a breakdown"):
        _ = without.breakdown
    own = score(view, pico_data, protocol, breakdown=True)
    assert not own.cached
    assert own.nats == without.nats
    again = score(view, pico_data, protocol, breakdown=True)
    assert again.cached
    assert again.breakdown.summary() == own.facts["breakdown"] == again.facts["breakdown"]
    assert 0 <= own.breakdown.top1_accuracy <= own.breakdown.top5_accuracy <= 1
    assert 0 <= own.breakdown.calibration_error <= 1
    (own.folder / FILE).write_bytes(b"x" * 40)
    assert not score(view, pico_data, protocol, breakdown=True).cached  # damage is noticed and made good
    (own.folder / FILE).write_bytes(b"x" * 40)
    with pytest.raises(DamagedFileError, match="is not a breakdown"):
        Breakdown.load(own.folder / FILE)


# ---- differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidate", "control"), [("sliding", "plain"), ("lora", "plain")])
def test_the_differences_of_bins_add_up_to_that_of_the_scores(
    bench: Bench, pico_data: DataFolder, candidate: str, control: str
) -> None:
    first, second = (ScoreSums(*detailed(bench, pico_data, name)[:2]) for name in (candidate, control))
    whole = compare(first.score, second.score)
    for kind in KINDS:
        rows = bin_differences(first, second, kind)
        assert math.fsum(row.bpb for row in rows) == pytest.approx(whole.difference_bpb, abs=1e-12)
        assert sum(row.tokens for row in rows) == sum(row.control_tokens for row in rows) == first.score.tokens
        assert all(row.low <= row.bpb <= row.high for row in rows)
        if KINDS[kind].of_text and kind not in ("position", "repeat"):
            assert all(row.tokens == row.control_tokens for row in rows)
        shown = difference_rows(rows, kind)
        assert len(shown[0]) == 6
        if kind == "confusions":  # a pair that one score does not name is among its other pairs
            named = {row.name for row in rows if row.tokens and row.control_tokens}
            assert {cells[0] for cells in shown} <= named


def test_a_bin_that_holds_everything_has_the_interval_of_the_whole(bench: Bench, pico_data: DataFolder) -> None:
    first, second = (ScoreSums(*detailed(bench, pico_data, name)[:2]) for name in ("sliding", "plain"))
    merged = [ScoreSums(one.score, Breakdown({"position": _merged(one.breakdown)})) for one in (first, second)]
    (row,) = bin_differences(merged[0], merged[1], "position")
    by_t = compare(first.score, second.score).by_t
    assert (row.low, row.high) == pytest.approx((by_t.low, by_t.high), abs=1e-12)


def _merged(breakdown: Breakdown) -> Any:
    cells = breakdown.kinds["position"]
    return type(cells)(("all",), cells.document, np.zeros_like(cells.bin), cells.sums)


def test_other_text_is_refused(bench: Bench, pico_data: DataFolder) -> None:
    first = ScoreSums(*detailed(bench, pico_data, "plain")[:2])
    more = replace(first.score, unit_bytes=first.score.unit_bytes + 1)
    second = ScoreSums(more, first.breakdown)
    with pytest.raises(MismatchError, match="different text"):
        bin_differences(first, second, "repeat")


def test_tables_show_shares_of_all_bits(bench: Bench, pico_data: DataFolder) -> None:
    _, breakdown, _ = detailed(bench, pico_data, "plain")
    rows = bin_rows(breakdown.kinds["token-class"].of_bins(), "token-class")
    assert sum(float(row[2].removesuffix(" %")) for row in rows) == pytest.approx(100, abs=0.05)
    assert len(bin_rows(breakdown.kinds["confusions"].of_bins(), "confusions")) <= 22

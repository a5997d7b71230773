"""Sliding-window laws: plain at stride = seq_len, every target once, the promised context, any process count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NumericsError, PgolfError
from pgolf_post.families import get_family, load_module
from pgolf_post.score import spans
from pgolf_post.score.plain import PlainProtocol, score_plain
from pgolf_post.score.protocols import folder_text
from pgolf_post.score.sliding import SlidingProtocol, sliding_spans
from pgolf_post.score.spans import batches_of, num_targets, places_of
from tests import processes
from tests.score.conftest import Bench

Tail = Literal["drop", "score"]


@given(targets=st.integers(1, 300), seq_len=st.integers(1, 40), stride=st.integers(1, 40))
def test_every_target_is_scored_once_with_the_promised_context(targets: int, seq_len: int, stride: int) -> None:
    stride = min(stride, seq_len)
    spans = sliding_spans(targets, seq_len, stride)
    assert places_of(spans).tolist() == list(range(1, targets + 1))
    assert max(span.length for span in spans) <= seq_len
    for span in spans[1:]:
        assert span.length - span.scored == seq_len - stride  # tokens of context before the first scored one's own
    assert sorted(span for batch in batches_of(spans, 64) for span in batch) == sorted(spans)


@pytest.mark.parametrize("tail", ["drop", "score"])
def test_stride_seq_len_is_plain(bench: Bench, tail: Tail) -> None:
    for seq_len in (32, 17, 5):
        slid = bench.score(SlidingProtocol(seq_len=seq_len, stride=seq_len, tail=tail))
        plain = bench.score(PlainProtocol(seq_len=seq_len, tail=tail))
        text = bench.tokens, bench.token_bytes
        assert slid.nats == pytest.approx(plain.nats, rel=1e-9)
        assert slid.nats == pytest.approx(
            score_plain(bench.module, *text, PlainProtocol(seq_len=seq_len, tail=tail)).nats, rel=1e-9
        )
        assert slid.window.tolist() == plain.window.tolist()
        assert (slid.tokens, slid.bytes) == (plain.tokens, plain.bytes)


def test_sliding_is_the_cross_entropy_of_its_windows(bench: Bench) -> None:
    seq_len, stride = 32, 8
    log = bench.log(SlidingProtocol(seq_len=seq_len, stride=stride, tail="score"))
    tokens = torch.from_numpy(bench.tokens.astype(np.int64))
    for target in (1, 31, 32, 33, 40, 41, 200, len(tokens) - 1):
        moved = -(-max(0, target - seq_len) // stride) * stride  # strides after the first window
        logits = bench.module(tokens[None, moved:target])[0, -1]
        expected = float(F.cross_entropy(logits[None].double(), tokens[target : target + 1]))
        assert log.nats[target] == pytest.approx(expected, rel=1e-5)


def test_both_protocols_count_the_same_targets(bench: Bench) -> None:
    for tail in ("drop", "score"):
        plain = bench.score(PlainProtocol(seq_len=32, tail=tail))  # type: ignore[arg-type]
        slid = bench.score(SlidingProtocol(seq_len=32, stride=8, tail=tail))  # type: ignore[arg-type]
        assert (slid.tokens, slid.bytes) == (plain.tokens, plain.bytes)
        assert slid.document_bytes.tolist() == plain.document_bytes.tolist()


def test_batches_change_nothing_but_the_last_digits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = SlidingProtocol(seq_len=32, stride=8)
    whole = bench.score(protocol).nats
    monkeypatch.setattr("pgolf_post.score.protocols.BATCH_TOKENS", 64)
    assert bench.score(protocol).nats == pytest.approx(whole, rel=1e-6)


def test_a_stride_beyond_the_window_and_a_short_text_are_refused(bench: Bench) -> None:
    with pytest.raises(MismatchError, match=r"stride 33 is not in 1\.\.32"):
        bench.score(SlidingProtocol(seq_len=32, stride=33))
    with pytest.raises(MismatchError, match=r"fewer than one window of 800"):
        num_targets(700, 800, "drop")
    assert num_targets(700, 800, "score") == 699


class Greedy:
    """A model that runs out of memory above so many windows at once."""

    def __init__(self, module: Any, most: int) -> None:
        self.module, self.most, self.logits, self.parameters = module, most, module.logits, module.parameters

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        hidden: torch.Tensor = self.module.hidden(tokens)
        return hidden


def test_out_of_memory_halves_the_batch_and_says_so(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    protocol = SlidingProtocol(seq_len=32, stride=8)
    whole = bench.score(protocol)
    bench.module = Greedy(bench.module, 3)
    again = bench.score(protocol)
    assert again.nats == pytest.approx(whole.nats, rel=1e-6)
    assert "out of memory with" in capsys.readouterr().err
    bench.module = Greedy(bench.module, 0)
    with pytest.raises(PgolfError, match="out of memory on a single window of 32 tokens") as caught:
        bench.score(protocol)
    assert "--seq-len" in str(caught.value.hint)


def test_other_runtime_errors_are_not_taken_for_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(spans, "target_nats", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        bench.score(PlainProtocol(seq_len=32))


@pytest.mark.parametrize("protocol", [PlainProtocol(seq_len=32), SlidingProtocol(seq_len=32, stride=8)])
def test_nan_names_document_and_position(bench: Bench, protocol: Any) -> None:
    bench.module.tok_emb.weight[int(bench.tokens[150])] = float("nan")
    with pytest.raises(NumericsError, match=r"target \d+ \(document \d+, token id \d+\) is nan"):
        bench.score(protocol)
    if isinstance(protocol, PlainProtocol):
        with pytest.raises(NumericsError, match="target"):
            score_plain(bench.module, bench.tokens, bench.token_bytes, protocol)


RANKS_SCRIPT = """
import json
import sys
from pathlib import Path

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.base.ranks import Ranks, end_process
from pgolf_post.score import protocols
from pgolf_post.score.cached import score_view
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol

protocols.BATCH_TOKENS = 96  # so that a pico text has many batches to share
ranks = Ranks.join()
view, data = Checkpoint.open(Path(sys.argv[1])).load(), DataFolder.open(Path(sys.argv[2]))
for protocol in (PlainProtocol(seq_len=16), SlidingProtocol(seq_len=16, stride=4)):
    for _ in range(2):
        score, cached = score_view(view, data, protocol, session=Session(ranks=ranks))
        if ranks.is_main:
            print(json.dumps([score["nats"], score["tokens"], cached]), flush=True)
ranks.leave()
end_process(0)
"""


def test_ranks_give_the_same_number(
    tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = processes.run_ranks(2, "-c", RANKS_SCRIPT, str(pico_checkpoint.path), str(pico_data.path))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [cached for _, _, cached in answers] == [False, True, False, True]
    monkeypatch.setattr("pgolf_post.score.protocols.BATCH_TOKENS", 96)
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    for protocol, (nats, count, _) in zip(
        (PlainProtocol(seq_len=16), SlidingProtocol(seq_len=16, stride=4)), answers[::2], strict=True
    ):
        alone = Bench(module, get_family("golf_gpt"), *folder_text(pico_data, protocol)).score(protocol)
        assert nats == pytest.approx(alone.nats, rel=1e-9)
        assert count == alone.tokens

"""Scoring laws: every target once, sums that add up, bytes of the original text, no dependence on batching."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor, nn

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, VerificationError
from pgolf_post.families import load_module
from pgolf_post.score import plain
from pgolf_post.score.bpb import Score, sum_units
from pgolf_post.score.byte_ngram import ByteNgram, byte_ngram_bpb, decode_documents
from pgolf_post.score.cached import score_view
from pgolf_post.score.metric import verify_metric
from pgolf_post.score.plain import PlainProtocol, score_folder, score_plain, score_windows, windows


class Uniform(nn.Module):
    """Every token equally likely: nats per token is ln(vocab_size)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(vocab_size))

    def hidden(self, tokens: Tensor) -> Tensor:
        return tokens[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.logit.expand(*hidden.shape[:-1], -1)


@given(num_tokens=st.integers(2, 200), seq_len=st.integers(1, 50))
def test_windows_cover_every_target_exactly_once(num_tokens: int, seq_len: int) -> None:
    targets = [start + i + 1 for start, length in windows(num_tokens, seq_len, "score") for i in range(length)]
    assert targets == list(range(1, num_tokens))
    dropped = [start + i + 1 for start, length in windows(num_tokens, seq_len, "drop") for i in range(length)]
    assert dropped == targets[: (num_tokens - 1) // seq_len * seq_len]


@pytest.mark.parametrize("tail", ["drop", "score"])
def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(pico_data: DataFolder, tail: str) -> None:
    protocol = PlainProtocol(seq_len=16, tail=tail)  # type: ignore[arg-type]
    score = score_folder(Uniform(320), pico_data, protocol)
    assert score.nats == pytest.approx(score.tokens * math.log(320), rel=1e-6)
    assert score.bpb == pytest.approx(score.nats / math.log(2) / score.bytes)


def test_all_bytes_of_the_text_are_counted(pico_data: DataFolder) -> None:
    score = score_folder(Uniform(320), pico_data, PlainProtocol(seq_len=16, tail="score"))
    assert score.bytes == pico_data.manifest["splits"]["val"]["num_bytes"]
    assert score.tokens == pico_data.manifest["splits"]["val"]["num_tokens"] - 1


def test_the_score_is_the_models_cross_entropy(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    score = score_folder(module, pico_data, PlainProtocol(seq_len=16))
    tokens = torch.from_numpy(pico_data.tokens("val").astype(np.int64))
    expected = 0.0
    for start in range(0, len(tokens) - 16, 16):
        logits = module(tokens[None, start : start + 16])[0]
        expected += float(F.cross_entropy(logits.double(), tokens[start + 1 : start + 17], reduction="sum"))
    assert score.nats == pytest.approx(expected, rel=1e-6)


def test_batch_size_changes_nothing(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    scores = []
    for batch_tokens in (16, 48, 16384):
        monkeypatch.setattr(plain, "BATCH_TOKENS", batch_tokens)
        scores.append(score_folder(module, pico_data, PlainProtocol(seq_len=16, tail="score")))
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-7)
    assert scores[0].nats == pytest.approx(scores[2].nats, rel=1e-7)


def test_per_document_sums_add_up_and_follow_bos(pico_data: DataFolder, tmp_path: Path) -> None:
    score = score_folder(Uniform(320), pico_data, PlainProtocol(seq_len=16, tail="score"))
    tokens = pico_data.tokens("val")
    starts = np.flatnonzero(tokens == BOS_ID)
    lengths = np.diff([*starts, len(tokens)])
    assert score.document_tokens[1:].tolist() == lengths[1:].tolist()  # a BOS target belongs to the document it opens
    assert score.document_tokens[0] == lengths[0] - 1  # the very first token is never a target
    score.save(tmp_path / "documents.safetensors")
    saved = load_file(tmp_path / "documents.safetensors")
    assert saved["nats"].dtype == np.float64
    assert math.fsum(saved["nats"]) == score.nats
    assert int(saved["bytes"].sum()) == score.bytes


def test_units_are_what_a_window_holds_of_a_document(pico_data: DataFolder, tmp_path: Path) -> None:
    score = score_folder(Uniform(320), pico_data, PlainProtocol(seq_len=16, tail="score"))
    tokens = pico_data.tokens("val")
    pairs = list(zip(score.window.tolist(), score.document.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    inner_bos = sum(1 for place in np.flatnonzero(tokens == BOS_ID) if place and (place - 1) % 16)
    assert len(pairs) == len(windows(len(tokens), 16, "score")) + inner_bos
    score.save(tmp_path / "documents.safetensors")
    again = Score.load(tmp_path / "documents.safetensors")
    assert np.array_equal(again.unit_nats, score.unit_nats)
    assert again.sums() == score.sums()
    (tmp_path / "documents.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(DamagedFileError, match="not a score's sums"):
        Score.load(tmp_path / "documents.safetensors")


def test_some_windows_score_as_they_do_among_all(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    module = load_module(view.config, view.tensors, "test")
    tokens = pico_data.tokens("val")
    text = tokens, pico_data.token_bytes("val", tokens)
    whole = score_plain(module, *text, PlainProtocol(seq_len=16))
    chosen = np.array([7, 2, 11])
    some = score_windows(module, *text, windows(len(tokens), 16, "drop"), chosen)
    assert dict.fromkeys(some.window.tolist()) == dict.fromkeys(chosen.tolist())
    for window in chosen:
        mine, theirs = some.window == window, whole.window == window
        assert some.document[mine].tolist() == whole.document[theirs].tolist()
        assert some.unit_bytes[mine].tolist() == whole.unit_bytes[theirs].tolist()
        np.testing.assert_allclose(some.unit_nats[mine], whole.unit_nats[theirs], rtol=1e-6)


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(MismatchError, match="fewer than one window"):
        score_plain(Uniform(4), np.zeros(5, dtype=np.uint16), np.ones(5, dtype=np.int64), PlainProtocol(seq_len=5))


def test_text_without_bytes_is_refused() -> None:
    with pytest.raises(MismatchError, match="no bytes"):
        sum_units(np.ones(5, dtype=np.uint16), np.arange(1, 5), np.zeros(4), np.ones(4), np.zeros(5, dtype=np.int64), 0)


def test_scores_are_cached_by_text_and_protocol(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    first, cached = score_view(view, pico_data, PlainProtocol(seq_len=16))
    assert not cached
    again, cached = score_view(view, pico_data, PlainProtocol(seq_len=16))
    assert cached
    assert again == first
    _, cached = score_view(view, pico_data, PlainProtocol(seq_len=8))
    assert not cached
    folders = list((view.checkpoint.path / "derived" / "score").iterdir())
    assert all((folder / "documents.safetensors").is_file() for folder in folders)


def test_verify_reproduces_the_recorded_metric_of_both_views(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    for name in ("raw", "ema"):
        assert verify_metric(pico_checkpoint.load(name), pico_data).passed  # type: ignore[arg-type]


def test_verify_refuses_other_data(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    other = DataFolder(pico_data.path, {**pico_data.manifest, "name": "other"})
    with pytest.raises(VerificationError, match="is not the data"):
        verify_metric(pico_checkpoint.load(), other)


# ---- the byte model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [b"abr", b"qqq", b"", b"x", b"\xff\x00\xff"])
def test_byte_model_probabilities_sum_to_one(context: bytes) -> None:
    model = ByteNgram([b"abracadabra" * 3, b"xyz", b""])
    before = model.nats(context)
    total = math.fsum(math.exp(before - model.nats(context + bytes([byte]))) for byte in range(256))
    assert total == pytest.approx(1.0, abs=1e-9)


def test_byte_model_learns_what_it_has_seen() -> None:
    model = ByteNgram([b"the cat sat on the mat. " * 20])
    assert model.nats(b"the cat sat") / 11 < 0.6
    assert model.nats(b"zzzzzzzzzzz") / 11 > 4


def test_byte_model_reads_the_folders_own_text(pico_data: DataFolder) -> None:
    documents = decode_documents(pico_data, pico_data.tokens("val"))
    split = pico_data.manifest["splits"]["val"]
    assert (len(documents), sum(map(len, documents))) == (split["num_documents"], split["num_bytes"])
    assert 0 < byte_ngram_bpb(pico_data) < 8

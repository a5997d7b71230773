"""Tokenizers: any text comes back, and every token stands for exactly its bytes of the original text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_post.data.build import build
from pgolf_post.data.documents import Document
from pgolf_post.data.encode import Encoder
from pgolf_post.data.settings import BuildSettings
from pgolf_post.data.tokenizer import BOS_ID, load_tokenizer
from pgolf_post.data.train_tokenizer import train_tokenizer
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, SettingsError

EXAMPLES = settings(max_examples=150, deadline=None)
TRICKY = " \u2581\n\t\r\0\u00a0\u3000\u200b\ufeff\ufffd\u2585\u0301\ufb01½Ⅷ㍿ＡİA1e.<s>"
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(TRICKY)), max_size=60)


def utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def test_control_ids_and_fixed_pieces(tokenizer: Any) -> None:
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert sum(tokenizer.is_byte(token) for token in range(tokenizer.vocab_size())) == 256
    assert len(tokenizer.encode("2024")) == 4
    assert tokenizer.encode("\n\n") == [tokenizer.piece_to_id("\n")] * 2


@EXAMPLES
@given(text=texts)
def test_trained_tokenizers_lose_nothing(tokenizer: Any, text: str) -> None:
    (tokens,) = Encoder.of(tokenizer).encode([text])
    assert tokens[0] == BOS_ID
    assert tokenizer.decode(tokens[1:].tolist()) == text


@EXAMPLES
@given(text=texts.map(lambda text: text.lstrip(" ")))
def test_byte_table_counts_the_text(tokenizer: Any, text: str) -> None:
    encoder = Encoder.of(tokenizer)
    (tokens,) = encoder.encode([text])
    counts = encoder.table_bytes(tokens)
    assert counts[0] == 0
    assert int(counts.sum()) == utf8_bytes(text)
    assert np.array_equal(counts, encoder.original_bytes(text, tokens))


@EXAMPLES
@given(text=texts.map(lambda text: text.lstrip(" ").replace("\u2581", "")).filter(bool))
def test_offsets_agree_with_the_byte_table(tokenizer: Any, text: str) -> None:
    """Two ways to the same numbers, for a tokenizer that changes nothing."""
    encoder = Encoder.of(tokenizer)
    (tokens,) = encoder.encode([text])
    by_offsets = encoder._offset_bytes(text, utf8_bytes(text))
    assert np.array_equal(by_offsets, encoder.table_bytes(tokens)[1:])


@EXAMPLES
@given(text=texts)
def test_original_bytes_of_a_normalising_tokenizer(normalising_model: Path, text: str) -> None:
    encoder = Encoder.of(load_tokenizer(normalising_model))
    assert not encoder.is_lossless
    (tokens,) = encoder.encode([text])
    if len(tokens) > 1:
        counts = encoder.original_bytes(text, tokens)
        assert counts[0] == 0
        assert counts.min() >= 0
        assert int(counts.sum()) == utf8_bytes(text)


def test_training_is_deterministic_and_bounded(documents: list[Document]) -> None:
    texts = [document.text for document in documents]
    first = train_tokenizer(texts, 350, 20_000)
    assert first == train_tokenizer(texts, 350, 20_000)
    assert first == train_tokenizer([*texts, "never read " * 5000], 350, 20_000)


def test_vocabulary_out_of_reach_names_the_limit(documents: list[Document]) -> None:
    texts = [documents[0].text[:2000]]
    with pytest.raises(SettingsError, match=r"vocab_size 5000 .* at most (\d+)") as too_many:
        train_tokenizer(texts, 5000, 10_000)
    assert too_many.value.hint is not None
    limit = int(too_many.value.hint.removeprefix("--vocab-size "))
    assert train_tokenizer(texts, limit, 10_000)
    with pytest.raises(SettingsError, match=r"vocab_size 262 is too small.* at least (\d+)"):
        train_tokenizer(texts, 262, 10_000)
    with pytest.raises(SettingsError, match=r"vocab_size 3 is too small"):
        train_tokenizer(texts, 3, 10_000)


def test_a_token_too_long_for_a_sidecar(normalising_model: Path) -> None:
    encoder = Encoder.of(load_tokenizer(normalising_model))
    text = "a" + " " * 70_000 + "b"
    (tokens,) = encoder.encode([text])
    with pytest.raises(MismatchError, match=r"stands for 7000. bytes .* at most 65535"):
        encoder.original_bytes(text, tokens)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DamagedFileError, match=r"bad\.model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(NotFoundError, match=r"none\.model"):
        load_tokenizer(tmp_path / "none.model")


def test_a_tokenizer_with_another_bos_is_refused(tmp_path: Path, documents: list[Document]) -> None:
    class OtherBos:
        def bos_id(self) -> int:
            return 7

    with pytest.raises(MismatchError, match="BOS id is 7"):
        Encoder.of(OtherBos())
    with pytest.raises(NotFoundError):
        build(documents, tmp_path / "x", BuildSettings(), tokenizer_path=tmp_path / "none.model")
    assert not (tmp_path / "x").exists()

"""Ladders of several vocabularies: all score the same text, and other texts are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.errors import MismatchError
from pgolf_post.sizing.text import same_text
from tests.conftest import pico_documents


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """The pico documents with fewer pieces."""
    settings = BuildSettings(name="small", vocab_size=300, val_fraction=0.2)
    return build(pico_documents(), tmp_path_factory.mktemp("small") / "data", settings)


def bytes_of(folder: DataFolder, tokens: int | None) -> int:
    return int(folder.token_bytes("val", folder.tokens("val", tokens)).sum())


def test_another_vocabulary_reads_the_same_bytes(pico_data: DataFolder, other_vocabulary: DataFolder) -> None:
    texts = same_text([pico_data, other_vocabulary], 200)
    own, other = texts.of(pico_data), texts.of(other_vocabulary)
    assert own.eval_tokens == 200
    assert other.eval_tokens is not None
    assert other.eval_tokens > 200  # fewer pieces, more tokens
    wanted = bytes_of(pico_data, 200)
    assert bytes_of(other_vocabulary, other.eval_tokens - 1) < wanted <= bytes_of(other_vocabulary, other.eval_tokens)
    assert other.token_bytes < own.token_bytes


def test_the_whole_split_and_one_vocabulary_need_no_counting(
    pico_data: DataFolder, other_vocabulary: DataFolder
) -> None:
    whole = same_text([pico_data, other_vocabulary], None)
    assert whole.of(pico_data).eval_tokens is whole.of(other_vocabulary).eval_tokens is None
    alone = same_text([pico_data], 200).of(pico_data)
    assert (alone.eval_tokens, alone.token_bytes) == (200, 1.0)


def test_folders_of_other_documents_are_refused(pico_data: DataFolder, tmp_path: Path) -> None:
    documents = list(pico_documents())[:50]
    fewer = build(iter(documents), tmp_path / "fewer", BuildSettings(name="fewer", vocab_size=300, val_fraction=0.2))
    with pytest.raises(MismatchError, match="bits per byte of different texts do not compare"):
        same_text([pico_data, fewer], 200)

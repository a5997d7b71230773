"""What the data tests share: a few documents, and a tokenizer and folder built from them once."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from pgolf_post.data.build import build
from pgolf_post.data.documents import Document
from pgolf_post.data.folder import DataFolder
from pgolf_post.data.settings import BuildSettings
from pgolf_post.data.stdlib_corpus import _topic_documents

SMALL = BuildSettings(name="small", vocab_size=400, val_fraction=0.2, tokens_per_shard=20_000)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """About 150 kB of English and code, and one document of what tokenizers stumble over."""
    topics = [Document(document.key, document.text[:8000]) for document in itertools.islice(_topic_documents(), 30)]
    odd = "  Zwölf Boxkämpfer \u2581 mark\r\n\ttab\u00a0 \ufb01ligature e\u0301 \U0001f600  \u200b\n\n\n   end  "
    return [*topics, Document("odd", odd)]


@pytest.fixture(scope="session")
def built(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A folder that nobody may change."""
    return build(documents, tmp_path_factory.mktemp("built") / "small", SMALL)


@pytest.fixture(scope="session")
def tokenizer(built: DataFolder) -> Any:
    """A tokenizer as `data build` trains it."""
    return built.tokenizer


@pytest.fixture(scope="session")
def normalising_model(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .model with sentencepiece's defaults: NFKC, collapsed spaces, a dummy prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for document in documents for line in document.text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "normalising.model"
    path.write_bytes(model.getvalue())
    return path

"""Building a data folder: documents in; a tokenizer, token shards and a manifest out, all of it or nothing.

A document's place is decided by the sha256 of its key: it orders the corpus, and its lowest `val_fraction` is the
validation split, so adding documents never moves one across. Each document is BOS and its tokens. Leading spaces are
stripped (a space right after BOS is the tokenizer's, not the text's, in the challenge's byte rule), so that the bytes
which a score divides by are exactly those of the text. The same inputs give the same manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.storage import atomic_folder, sha256_file, write_json
from pgolf_post.data.documents import Document
from pgolf_post.data.encode import Encoder
from pgolf_post.data.folder import FORMAT_VERSION, MANIFEST_NAME, DataFolder, Split
from pgolf_post.data.shards import write_shard
from pgolf_post.data.tokenizer import load_tokenizer
from pgolf_post.data.train_tokenizer import MAX_VOCAB_SIZE, train_tokenizer
from pgolf_post.errors import MismatchError, PgolfError, SettingsError
from pgolf_post.settings import Settings

TOKENIZER_NAME = "tokenizer.model"
MAX_TEXT_BYTES = 4_000_000_000  # the corpus is held in memory to be ordered
BATCH_BYTES = 2_000_000


class BuildSettings(Settings):
    """What decides a built folder's contents, besides its documents."""

    name: str = Field("data", min_length=1)
    vocab_size: int = Field(1024, gt=0, le=MAX_VOCAB_SIZE)
    val_fraction: float = Field(0.04, gt=0.0, lt=1.0)
    tokens_per_shard: int = Field(100_000_000, gt=0)
    tokenizer_sample_bytes: int = Field(8_000_000, gt=0)
    byte_sidecar: bool = False
    num_threads: int = Field(2, gt=0)  # changes only how long it takes


def build(
    documents: Iterable[Document],
    out: Path,
    settings: BuildSettings,
    *,
    val_documents: Iterable[Document] | None = None,
    tokenizer_path: Path | None = None,
    source: Mapping[str, Any] | None = None,
    force: bool = False,
) -> DataFolder:
    """Write the data folder `out` and open it. `source` goes into the manifest as it is.

    Raises PgolfError if `out` exists (unless `force`) or a split comes out empty, SettingsError for a vocabulary that
    the text cannot fill, MismatchError for a tokenizer that does not fit or text that is on both sides of the split.
    """
    refuse_destination(out, force)
    corpus = Corpus.split(documents, val_documents, settings.val_fraction)
    with atomic_folder(out, replace=force) as folder:
        model_path = folder / TOKENIZER_NAME
        model_path.write_bytes(_model_bytes(corpus, settings, tokenizer_path))
        encoder = Encoder.of(load_tokenizer(model_path), settings.num_threads)
        splits = {
            "val": write_split(folder, "val", corpus.val, encoder, settings),
            "train": write_split(folder, "train", corpus.train, encoder, settings),
        }
        manifest = _manifest(settings, model_path, encoder, corpus, splits, source, tokenizer_path is None)
        write_json(folder / MANIFEST_NAME, manifest)
    return DataFolder.open(out)


def refuse_destination(out: Path, force: bool) -> None:
    """Raise PgolfError if `out` is there and must not be replaced: without `force`, or if it is no data folder."""
    if not out.exists():
        return
    if not force:
        raise PgolfError(f"{out} already exists; nothing was written", hint="--force replaces it, --out names another")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).is_file()):
        raise PgolfError(f"{out} is not a data folder; nothing was written", hint="--out names another")


@dataclass
class Corpus:
    """The documents of both splits in their final order, and what was left out of them."""

    train: list[Document]
    val: list[Document]
    num_stripped_spaces: int = 0
    num_empty_documents: int = 0
    num_bytes: int = field(default=0, repr=False)

    @classmethod
    def split(
        cls, documents: Iterable[Document], val_documents: Iterable[Document] | None, val_fraction: float
    ) -> Corpus:
        """Split by hash of key, or as given. Raises PgolfError for an empty split, MismatchError for a shared key."""
        corpus = cls([], [])
        for document in corpus._cleaned(documents):
            is_val = val_documents is None and key_position(document.key) < val_fraction
            (corpus.val if is_val else corpus.train).append(document)
        corpus.val.extend(corpus._cleaned(val_documents or ()))
        corpus.train.sort(key=lambda document: _digest(document.key))
        corpus.val.sort(key=lambda document: _digest(document.key))
        corpus._refuse_empty_split(val_fraction)
        corpus._refuse_shared_keys()
        return corpus

    def _cleaned(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Documents without leading spaces; those without text are counted and left out."""
        for document in documents:
            text = document.text.lstrip(" ")
            self.num_stripped_spaces += len(document.text) - len(text)
            if not text:
                self.num_empty_documents += 1
                continue
            self._count_bytes(text)
            yield Document(document.key, text)

    def _count_bytes(self, text: str) -> None:
        self.num_bytes += len(text.encode("utf-8"))
        if self.num_bytes > MAX_TEXT_BYTES:
            raise PgolfError(
                f"the documents have more than {MAX_TEXT_BYTES:,} bytes of text, the most one build holds in memory",
                hint="build from fewer files at a time",
            )

    def _refuse_empty_split(self, val_fraction: float) -> None:
        if not self.train and not self.val:
            raise PgolfError("the inputs hold no text", hint="pgolf-post data build --help")
        if not self.val or not self.train:
            raise PgolfError(
                f"no document came into {'val' if self.train else 'train'}: "
                f"{len(self.train) + len(self.val)} documents were split at a validation fraction of {val_fraction}",
                hint="name validation documents with --val FILE, or choose another --val-fraction",
            )

    def _refuse_shared_keys(self) -> None:
        shared = sorted({document.key for document in self.train} & {document.key for document in self.val})
        if shared:
            raise MismatchError(
                f"{len(shared)} validation documents are also in train, the first is {shared[0]}",
                hint="take them out of the training files: a score on text that was trained on means nothing",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def key_position(key: str) -> float:
    """A key's place in [0, 1), uniform over keys."""
    return int.from_bytes(_digest(key)[:6], "big") / (1 << 48)


def _model_bytes(corpus: Corpus, settings: BuildSettings, tokenizer_path: Path | None) -> bytes:
    """The given .model file, or one trained on the head of train."""
    if tokenizer_path is None:
        say(f"training a tokenizer of {settings.vocab_size} pieces")
        texts = (document.text for document in corpus.train)
        return train_tokenizer(texts, settings.vocab_size, settings.tokenizer_sample_bytes)
    vocab_size = load_tokenizer(tokenizer_path).vocab_size()
    if vocab_size > MAX_VOCAB_SIZE:
        raise SettingsError(
            f"{tokenizer_path} has {vocab_size} pieces, a shard's tokens allow at most {MAX_VOCAB_SIZE}"
        )
    return tokenizer_path.read_bytes()


def write_split(
    folder: Path, split: Split, documents: Sequence[Document], encoder: Encoder, settings: BuildSettings
) -> dict[str, Any]:
    """Tokenize documents into the split's shards; return its entry of the manifest.

    Raises MismatchError if the tokenizer drops a whole document, or if validation bytes need a sidecar and have none.
    """
    with_sidecar = settings.byte_sidecar and split == "val"
    shards = ShardWriter(folder, f"fineweb_{split}_{{:06d}}.bin", settings.tokens_per_shard)
    sidecars = ShardWriter(folder, f"fineweb_{split}_bytes_{{:06d}}.bin", settings.tokens_per_shard)
    num_bytes = table_bytes = 0
    total_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
    with progress_bar(f"tokenizing {split}, kB", total_bytes // 1000) as advance:
        for batch in _batches(documents):
            for document, tokens in zip(batch, encoder.encode([document.text for document in batch]), strict=True):
                shards.add(tokens)
                table_bytes += int(encoder.table_bytes(tokens).sum())
                if with_sidecar:
                    sidecars.add(_sidecar_entries(encoder, document, tokens))
            batch_bytes = sum(len(document.text.encode("utf-8")) for document in batch)
            num_bytes += batch_bytes
            advance(batch_bytes / 1000)
    if split == "val" and not with_sidecar:
        _refuse_inexact_bytes(table_bytes, num_bytes)
    return {
        "num_tokens": shards.num_tokens,
        "num_documents": len(documents),
        "num_bytes": num_bytes,
        "shards": shards.finish(),
        "byte_sidecars": sidecars.finish(),
    }


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about BATCH_BYTES characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sidecar_entries(encoder: Encoder, document: Document, tokens: np.ndarray) -> np.ndarray:
    """The document's bytes per token. Raises MismatchError if there is no token to carry them."""
    if len(tokens) == 1:
        raise MismatchError(
            f"the tokenizer drops all of document {document.key} ({document.text[:40]!r}); no token carries its bytes",
            hint="remove that document, or leave out --tokenizer to train one that keeps all text",
        )
    return encoder.original_bytes(document.text, tokens)


def _refuse_inexact_bytes(table_bytes: int, num_bytes: int) -> None:
    if table_bytes != num_bytes:
        raise MismatchError(
            f"the tokenizer changes the text: by its byte table the validation split has {table_bytes} bytes, its "
            f"documents have {num_bytes}; bits per byte would divide by the wrong number",
            hint="--byte-sidecar records the original bytes of each token",
        )


class ShardWriter:
    """Cuts a stream of arrays into shards of `tokens_per_shard` values; documents may straddle, as in the challenge."""

    def __init__(self, folder: Path, pattern: str, tokens_per_shard: int) -> None:
        self.folder, self.pattern, self.tokens_per_shard = folder, pattern, tokens_per_shard
        self.num_tokens = 0
        self._entries: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, values: np.ndarray) -> None:
        """Append values (n,) in 0..65535; writes each shard once it is full."""
        self.num_tokens += len(values)
        while self._num_pending + len(values) >= self.tokens_per_shard:
            room = self.tokens_per_shard - self._num_pending
            self._hold(values[:room])
            self._write()
            values = values[room:]
        self._hold(values)

    def finish(self) -> list[dict[str, Any]]:
        """Write what is pending; return [{file, sha256, num_tokens}]."""
        if self._num_pending:
            self._write()
        return self._entries

    def _hold(self, values: np.ndarray) -> None:
        if len(values):
            self._pending.append(values)
            self._num_pending += len(values)

    def _write(self) -> None:
        path = self.folder / self.pattern.format(len(self._entries))
        write_shard(path, np.concatenate(self._pending))
        self._entries.append({"file": path.name, "sha256": sha256_file(path), "num_tokens": self._num_pending})
        self._pending, self._num_pending = [], 0


def _manifest(
    settings: BuildSettings,
    model_path: Path,
    encoder: Encoder,
    corpus: Corpus,
    splits: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    is_trained: bool,
) -> dict[str, Any]:
    """The folder's manifest. Nothing in it depends on when, where or how fast it was built."""
    import sentencepiece

    return {
        "format_version": FORMAT_VERSION,
        "name": settings.name,
        "tokenizer": {
            "file": model_path.name,
            "sha256": sha256_file(model_path),
            "vocab_size": encoder.tokenizer.vocab_size(),
        },
        "splits": {"train": splits["train"], "val": splits["val"]},
        "source": {
            "made_by": "pgolf-post data build",
            **(source or {}),
            "settings": _recorded(settings, is_trained),
            "sentencepiece": sentencepiece.__version__,
            "stripped_leading_spaces": corpus.num_stripped_spaces,
            "empty_documents": corpus.num_empty_documents,
        },
    }


def _recorded(settings: BuildSettings, is_trained: bool) -> dict[str, Any]:
    """The settings that had a part in the folder's contents."""
    unused = {"name", "num_threads"} | (set() if is_trained else {"vocab_size", "tokenizer_sample_bytes"})
    return settings.model_dump(exclude=unused)


def describe_inputs(paths: Sequence[Path]) -> list[dict[str, str]]:
    """What a manifest records of input files: name and sha256, not where they lay."""
    return [{"file": path.name, "sha256": sha256_file(path)} for path in paths]

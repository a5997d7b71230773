"""One split as token shards: documents in order, each as BOS and its tokens; where asked for, a byte sidecar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.storage import sha256_file
from pgolf_post.data.documents import Document
from pgolf_post.data.encode import Encoder
from pgolf_post.data.folder import Split
from pgolf_post.data.settings import BuildSettings
from pgolf_post.data.shards import write_shard
from pgolf_post.errors import MismatchError

BATCH_CHARS = 2_000_000  # characters that are tokenized at a time


def write_split(
    folder: Path, split: Split, documents: Sequence[Document], encoder: Encoder, settings: BuildSettings
) -> dict[str, Any]:
    """Tokenize documents into the split's shards; return its part of the manifest.

    Raises MismatchError if the tokenizer drops a whole document, or if validation bytes need a sidecar and have none.
    """
    with_sidecar = settings.byte_sidecar and split == "val"
    shards = ShardWriter(folder, f"fineweb_{split}_{{:06d}}.bin", settings.tokens_per_shard)
    sidecars = ShardWriter(folder, f"fineweb_{split}_bytes_{{:06d}}.bin", settings.tokens_per_shard)
    num_bytes = table_bytes = 0
    total_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
    # tokenize batch by batch, counting the bytes of the text and those that the byte table states
    with progress_bar(f"tokenizing {split}", total_bytes // 1000, "kB") as advance:
        for batch in _batches(documents):
            for document, tokens in zip(batch, encoder.encode([document.text for document in batch]), strict=True):
                shards.add(tokens)
                table_bytes += int(encoder.table_bytes(tokens).sum())
                if with_sidecar:
                    sidecars.add(_sidecar_entries(encoder, document, tokens))
            batch_bytes = sum(len(document.text.encode("utf-8")) for document in batch)
            num_bytes += batch_bytes
            advance(batch_bytes / 1000)
    # a score divides by these bytes: without a sidecar the table must state them exactly
    if split == "val" and not with_sidecar:
        _refuse_inexact_bytes(table_bytes, num_bytes)
    if split == "train" and table_bytes != num_bytes:
        say(f"the tokenizer changes the training text: {num_bytes:,} bytes of text, {table_bytes:,} by the byte table")
    return {
        "num_tokens": shards.num_tokens,
        "num_documents": len(documents),
        "num_bytes": num_bytes,
        "shards": shards.finish(),
        "byte_sidecars": sidecars.finish(),
    }


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield runs of documents of about BATCH_CHARS characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sidecar_entries(encoder: Encoder, document: Document, tokens: np.ndarray) -> np.ndarray:
    """Return the document's bytes per token. Raises MismatchError if there is no token to carry them."""
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
    """Cut a stream of arrays into shards of `tokens_per_shard` values; a document may continue in the next shard."""

    def __init__(self, folder: Path, pattern: str, tokens_per_shard: int) -> None:
        self.folder, self.pattern, self.tokens_per_shard = folder, pattern, tokens_per_shard
        self.num_tokens = 0
        self._entries: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, values: np.ndarray) -> None:
        """Append values (n,) in 0..65535, and write each shard that is full."""
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

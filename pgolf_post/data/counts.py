"""Counting a split from its shards: tokens, documents, and bytes of text by the byte table.

What the manifest of a download states and what `data check` recomputes are these numbers, read in bounded pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_post.data.folder import check_token_ids
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID, ByteTable

CHUNK_TOKENS = 8_000_000


@dataclass(frozen=True)
class SplitCounts:
    """A split's size, recomputed. `table_bytes` is by the byte table; a byte sidecar may say otherwise."""

    num_tokens: int
    num_documents: int
    table_bytes: int


def count_split(paths: Sequence[Path], table: ByteTable) -> SplitCounts:
    """Count the shards at `paths` as one stream. Raises MismatchError for ids that the vocabulary does not have."""
    num_tokens = num_documents = table_bytes = 0
    for previous, targets in contexts(paths, len(table.piece_bytes)):
        num_tokens += len(targets)
        num_documents += int(np.count_nonzero(targets == BOS_ID))
        table_bytes += int(table.count(previous, targets).sum())
    return SplitCounts(num_tokens, num_documents, table_bytes)


def contexts(paths: Sequence[Path], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(previous, targets) arrays, each (n,) with n at most CHUNK_TOKENS, that cover the shards in order.

    The token before the first is taken to be BOS. Raises MismatchError for ids that the vocabulary does not have.
    """
    last = BOS_ID
    for path in paths:
        shard = read_shard(path)
        for start in range(0, len(shard), CHUNK_TOKENS):
            targets = np.asarray(shard[start : start + CHUNK_TOKENS])
            check_token_ids(targets, vocab_size, path)
            yield np.concatenate([[last], targets[:-1]]), targets
            last = int(targets[-1])


def sidecar_bytes(paths: Sequence[Path]) -> int:
    """Bytes of text that byte sidecars state."""
    return sum(int(np.sum(read_shard(path), dtype=np.int64)) for path in paths)

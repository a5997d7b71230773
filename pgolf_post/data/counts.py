"""Counts of a split, from its shards: tokens, documents, and bytes of text by the byte table.

A download writes these numbers into its manifest, and `data check` recomputes them, in pieces of bounded size.
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
    """A split's size. `table_bytes` is by the byte table, from which a byte sidecar may differ."""

    num_tokens: int
    num_documents: int
    table_bytes: int
    num_unknown: int  # pieces that stand for text which the vocabulary cannot spell, and count 0 bytes


def count_split(paths: Sequence[Path], table: ByteTable) -> SplitCounts:
    """Count the shards at `paths` as one stream. Raises MismatchError for ids that the vocabulary does not have."""
    num_tokens = num_documents = table_bytes = num_unknown = 0
    for previous, targets in contexts(paths, len(table.piece_bytes)):
        num_tokens += len(targets)
        num_documents += int(np.count_nonzero(targets == BOS_ID))
        table_bytes += int(table.count(previous, targets).sum())
        num_unknown += int(np.count_nonzero(targets == table.unknown_id))
    return SplitCounts(num_tokens, num_documents, table_bytes, num_unknown)


def contexts(paths: Sequence[Path], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (previous, targets) arrays, each (n,) with n at most CHUNK_TOKENS, that cover the shards in order.

    The token before the first counts as BOS. Raises MismatchError for ids that the vocabulary does not have.
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
    """Return the bytes of text that byte sidecars state."""
    return sum(int(np.sum(read_shard(path), dtype=np.int64)) for path in paths)

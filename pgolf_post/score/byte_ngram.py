"""An interpolated order-3 byte model: the yardstick that a trained network must beat.

p_k(c | last k bytes) = (count(h, c) + T(h)·p_{k-1}(c | last k-1 bytes)) / (count(h) + T(h)), with T(h) the number of
different bytes seen after h (Witten & Bell 1991), down to the uniform distribution over 256 bytes. Counts come from the
training split alone; documents are isolated by starting each from an empty context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pgolf_post.data import BOS_ID, DataFolder

ORDER = 3


@dataclass(frozen=True)
class _Counts:
    """Sorted codes of one order and their counts."""

    grams: np.ndarray  # (n,) int64: context and byte
    gram_counts: np.ndarray  # (n,) int64
    contexts: np.ndarray  # (m,) int64
    context_counts: np.ndarray  # (m,) int64
    continuations: np.ndarray  # (m,) int64: different bytes seen after each context

    @classmethod
    def of(cls, codes: np.ndarray) -> _Counts:
        grams, gram_counts = np.unique(codes, return_counts=True)
        contexts, first, continuations = np.unique(grams // 256, return_index=True, return_counts=True)
        return cls(grams, gram_counts, contexts, np.add.reduceat(gram_counts, first), continuations)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return values at the positions where sorted `keys` equals `wanted`, 0 where it does not occur."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _codes(text: np.ndarray, order: int) -> np.ndarray:  # (n,) uint8 → (n,) int64
    """Return each byte with its `order` predecessors as one integer; a missing one is 256, which equals no byte."""
    padded = np.concatenate([np.full(order, 256, dtype=np.int64), text.astype(np.int64)])
    code = np.zeros(len(text), dtype=np.int64)
    for back in range(order, 0, -1):
        code = code * 257 + padded[order - back : order - back + len(text)]
    return code * 256 + text


class ByteNgram:
    """The model, fitted on construction."""

    def __init__(self, documents: Iterable[bytes], order: int = ORDER) -> None:
        texts = [np.frombuffer(document, dtype=np.uint8) for document in documents]
        self.order = order
        self.counts = [_Counts.of(np.concatenate([_codes(text, k) for text in texts])) for k in range(order + 1)]

    def nats(self, document: bytes) -> float:
        """Return -log p of one document."""
        text = np.frombuffer(document, dtype=np.uint8)
        probability = np.full(len(text), 1 / 256)
        for k, counts in enumerate(self.counts):
            codes = _codes(text, k)
            seen = _lookup(counts.grams, counts.gram_counts, codes)
            total = _lookup(counts.contexts, counts.context_counts, codes // 256)
            kinds = _lookup(counts.contexts, counts.continuations, codes // 256)
            mixed = (seen + kinds * probability) / np.maximum(total + kinds, 1)
            probability = np.where(total > 0, mixed, probability)
        return float(-np.log(probability).sum())


def decode_documents(data: DataFolder, tokens: np.ndarray) -> list[bytes]:  # tokens: (n,), BOS before each document
    """Return the documents of a token stream as UTF-8 text."""
    starts = np.flatnonzero(tokens == BOS_ID)
    bounds = [*starts.tolist(), len(tokens)]
    pieces: Sequence[list[int]] = [tokens[a + 1 : b].tolist() for a, b in pairwise(bounds)]
    return [text.encode("utf-8") for text in data.tokenizer.decode(list(pieces))]


def byte_ngram_bpb(data: DataFolder, max_train_tokens: int | None = None, max_tokens: int | None = None) -> float:
    """Return bpb on validation (its first max_tokens tokens) of an order-3 byte model fitted on the training split."""
    model = ByteNgram(decode_documents(data, data.tokens("train", max_train_tokens)))
    documents = decode_documents(data, data.tokens("val", max_tokens))
    nats = math.fsum(model.nats(document) for document in documents)
    return nats / math.log(2) / sum(map(len, documents))

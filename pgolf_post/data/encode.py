"""Text → tokens, and each token → the bytes of original text that it stands for.

Two facts make this more than one call. U+2581 is sentencepiece's own mark for a space, so a text that contains it would
come back with a space: a lossless tokenizer gets it as its three byte pieces instead. And a tokenizer that normalises
(NFKC, collapsed spaces) stands for bytes that its pieces do not have: the offsets that sentencepiece reports say which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pgolf_post.data.tokenizer import BOS_ID, SPACE_MARK, ByteTable
from pgolf_post.errors import MismatchError

# Spaces at both ends and doubled, a newline, a tab, a no-break space, a ligature, a decomposed accent, a rare letter.
PROBE = "  two  spaces \n\tand \u00a0 \ufb01 e\u0301 \U00010348\n\n"
MAX_TOKEN_BYTES = 0xFFFF  # a byte sidecar's entries are uint16


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its byte table, for whole documents. Make one with `Encoder.of`."""

    tokenizer: Any
    num_threads: int = 2

    @classmethod
    def of(cls, tokenizer: Any, num_threads: int = 2) -> Encoder:
        """Return the tokenizer's encoder. Raises MismatchError if its BOS is not the id that shards use."""
        if tokenizer.bos_id() != BOS_ID:
            raise MismatchError(
                f"the tokenizer's BOS id is {tokenizer.bos_id()}, but shards open each document with id {BOS_ID}",
                hint="leave out --tokenizer to train one with the challenge's control ids",
            )
        return cls(tokenizer, num_threads)

    @cached_property
    def byte_table(self) -> ByteTable:
        return ByteTable.from_tokenizer(self.tokenizer)

    @cached_property
    def is_lossless(self) -> bool:
        """Whether decoding reproduces PROBE, a text that every common normalization changes."""
        return bool(self.tokenizer.decode(self.tokenizer.encode(PROBE)) == PROBE)

    @cached_property
    def _mark_ids(self) -> list[int]:
        """The byte pieces of U+2581; empty if the tokenizer has none."""
        ids = [int(self.tokenizer.piece_to_id(f"<0x{byte:02X}>")) for byte in SPACE_MARK.encode("utf-8")]
        return ids if all(self.tokenizer.is_byte(token) for token in ids) else []

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:  # each (1 + tokens of the text,) uint16
        """Return each text as BOS and its tokens."""
        plain = [text for text in texts if not self._needs_escape(text)]
        encoded = iter(self.tokenizer.encode(plain, num_threads=self.num_threads) if plain else [])
        ids = [self._encode_marks(text) if self._needs_escape(text) else next(encoded) for text in texts]
        return [np.array([BOS_ID, *tokens], dtype=np.uint16) for tokens in ids]

    def _needs_escape(self, text: str) -> bool:
        return SPACE_MARK in text and self.is_lossless and bool(self._mark_ids)

    def _encode_marks(self, text: str) -> list[int]:
        """Return the tokens of a text with U+2581 in it: those between the marks, and the mark's byte pieces."""
        first, *others = self.tokenizer.encode(text.split(SPACE_MARK))
        return [*first, *(token for tokens in others for token in [*self._mark_ids, *tokens])]

    def table_bytes(self, tokens: np.ndarray) -> np.ndarray:  # (n,) int64, for the (n,) tokens of one document
        """Return bytes per token by the byte table; BOS counts 0."""
        return self.byte_table.count(np.concatenate([[BOS_ID], tokens[:-1]]), tokens)

    def original_bytes(self, text: str, tokens: np.ndarray) -> np.ndarray:  # (n,) int64, BOS included as 0
        """Return the bytes of `text` that each token stands for; they add up to its length in UTF-8.

        Raises MismatchError for a token that stands for more bytes than a sidecar's uint16 can hold.
        """
        num_bytes = len(text.encode("utf-8"))
        counts = self.table_bytes(tokens)
        if not self.is_lossless or int(counts.sum()) != num_bytes:
            counts[1:] = self._offset_bytes(text, num_bytes)
        if counts.size and int(counts.max()) > MAX_TOKEN_BYTES:
            piece = self.tokenizer.id_to_piece(int(tokens[int(counts.argmax())]))
            raise MismatchError(
                f"token {piece!r} stands for {int(counts.max())} bytes of one document, but a byte sidecar holds at "
                f"most {MAX_TOKEN_BYTES} per token: the tokenizer collapses a run of spaces that long",
                hint="shorten such runs in the text, or leave out --tokenizer to train one that keeps them",
            )
        return counts

    def _offset_bytes(self, text: str, num_bytes: int) -> np.ndarray:  # (tokens without BOS,) int64
        """Return bytes per token by sentencepiece's offsets: from a token's begin to the next one's."""
        serialized = self.tokenizer.encode(text, out_type="serialized_proto")
        ids, begins = _ids_and_begins(serialized)
        edges = np.array([*begins, num_bytes], dtype=np.int64)
        edges[0] = 0  # what the normalizer dropped before the first token belongs to it
        counts = np.diff(edges)
        return self._spread_over_byte_pieces(counts, np.array(ids, dtype=np.int64), edges[:-1])

    def _spread_over_byte_pieces(self, counts: np.ndarray, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Give each byte piece its own byte: sentencepiece counts all bytes of a character on its last piece."""
        is_byte = np.array([self.tokenizer.is_byte(int(token)) for token in ids], dtype=bool)
        starts = np.flatnonzero(np.diff(begins, prepend=-1))  # tokens that begin at one place form a group
        sizes = np.diff(starts, append=len(ids))
        even = (np.add.reduceat(counts, starts) == sizes) & np.logical_and.reduceat(is_byte, starts)
        return np.where(np.repeat(even, sizes), 1, counts)


def _ids_and_begins(serialized: bytes) -> tuple[list[int], list[int]]:
    """Return ids and UTF-8 begin offsets of a SentencePieceText (pieces = 2: {id = 2, begin = 4}; zeros are left out).

    Read by hand because the protobuf package is no dependency of ours, and every sentencepiece release writes it.
    """
    ids: list[int] = []
    begins: list[int] = []
    for field, value in _fields(serialized):
        if field == 2 and isinstance(value, bytes):
            piece = dict(_fields(value))
            ids.append(int(piece.get(2, 0)))
            begins.append(int(piece.get(4, 0)))
    return ids, begins


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, int or bytes) of a protobuf message, skipping 32-bit floats."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 5:
            position += 4
            continue
        number, position = _varint(data, position)
        if kind == 2:
            yield tag >> 3, data[position : position + number]
            position += number
        else:
            yield tag >> 3, number


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a base-128 integer and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7

"""The sentencepiece tokenizer, and its byte table: the bytes of text that each token stands for.

Bits per byte divides by bytes of the original text, so the byte table *is* the metric's denominator. The rule is the
challenge's: control, unknown and unused pieces count 0; a byte-fallback piece counts 1; any other piece counts its
UTF-8 length without the leading U+2581, plus 1 for the space which that mark stands for, unless the previous token is
a boundary (control) token. A U+2581 inside a piece also stands for one space and counts 1: the challenge's tokenizers
have no such piece, tokenizers for indented text do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.paths import absent
from pgolf_post.errors import DamagedFileError, NotFoundError

BOS_ID = 1  # every document in a shard starts with this token
SPACE_MARK = "\u2581"


def load_tokenizer(path: Path) -> Any:
    """Load a sentencepiece .model. Raises NotFoundError, or DamagedFileError if sentencepiece refuses the file."""
    import sentencepiece

    if not path.is_file():
        raise NotFoundError(absent(path, "tokenizer"), hint="--tokenizer FILE.model names a sentencepiece model")
    content = path.read_bytes()
    try:
        if content:  # sentencepiece takes an empty file for a model without pieces
            return sentencepiece.SentencePieceProcessor(model_proto=content)
        raise ValueError
    except (RuntimeError, ValueError):
        raise DamagedFileError(
            f"{path} is not a sentencepiece model: {_what_it_is(content)}",
            hint="--tokenizer FILE.model names one; left out, data build trains one on the text",
        ) from None


def _what_it_is(content: bytes) -> str:
    """Return what a file is that is no sentencepiece model, for a message."""
    start = content[:200].lstrip()
    if not content:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer (git lfs pull fetches the file)"
    if start.startswith(b"{"):
        return "it is JSON, such as the tokenizer.json of Hugging Face's tokenizers, which is another format"
    if start.lower().startswith((b"<!doctype", b"<html")):
        return "it is an HTML page"
    is_text = not any(byte < 9 for byte in content[:512])
    return "it is text, such as a .vocab file" if is_text else f"its first bytes are {content[:8].hex(' ')}"


@dataclass(frozen=True)
class ByteTable:
    """Bytes of text per token id. All arrays have shape (vocab_size,)."""

    piece_bytes: np.ndarray  # int64, without the leading space
    has_leading_space: np.ndarray  # bool
    is_boundary: np.ndarray  # bool: control, unknown, unused
    unknown_id: int = -1  # the piece for text that the vocabulary cannot spell

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ByteTable:
        """Return the table of a sentencepiece processor."""
        vocab_size = tokenizer.vocab_size()
        piece_bytes = np.zeros(vocab_size, dtype=np.int64)
        has_leading_space = np.zeros(vocab_size, dtype=bool)
        is_boundary = np.zeros(vocab_size, dtype=bool)
        for token in range(vocab_size):
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                is_boundary[token] = True
            elif tokenizer.is_byte(token):
                piece_bytes[token] = 1
            else:
                piece = tokenizer.id_to_piece(token)
                has_leading_space[token] = piece.startswith(SPACE_MARK)
                text = piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ")
                piece_bytes[token] = len(text.encode("utf-8"))
        return cls(piece_bytes, has_leading_space, is_boundary, int(tokenizer.unk_id()))

    def count(
        self,
        previous: np.ndarray,  # (n,) the token before each target
        targets: np.ndarray,  # (n,)
    ) -> np.ndarray:  # (n,) int64 bytes of text each target stands for
        """Return the bytes of each target token, given the token before it."""
        space = self.has_leading_space[targets] & ~self.is_boundary[previous]
        counts: np.ndarray = self.piece_bytes[targets] + space
        return counts

"""Tokens of a vocabulary as a reader sees them: class, text, and whether a sentence ends there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pgolf_post.data.tokenizer import BOS_ID, SPACE_MARK, ByteTable

CLASSES = ("word start", "continuation", "punctuation", "digits", "white space", "byte fallback", "BOS", "control")
ENDS = (".", "!", "?", "…", "\n")  # of a sentence, before closing quotes and brackets
CLOSING = "\"'”’)]»"


@dataclass(frozen=True)
class TokenText:
    """A vocabulary as text; arrays are (vocab_size,)."""

    shown: list[str]  # quoted, with a plain space for the mark
    token_class: np.ndarray  # int64, place in CLASSES
    ends_sentence: np.ndarray  # bool

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenText:
        """Return the vocabulary of a sentencepiece processor."""
        rows = [_row(tokenizer, token) for token in range(tokenizer.vocab_size())]
        shown, kinds, ends = zip(*rows, strict=True)
        return cls(list(shown), np.array([CLASSES.index(kind) for kind in kinds]), np.array(ends))


def token_kinds(tokenizer: Any) -> str:
    """Return one hexadecimal digit per token: its place in CLASSES, plus 8 if it begins with a space."""
    classes = TokenText.from_tokenizer(tokenizer).token_class
    spaces = ByteTable.from_tokenizer(tokenizer).has_leading_space
    return "".join(f"{int(kind) + 8 * int(space):x}" for kind, space in zip(classes, spaces, strict=True))


def _row(tokenizer: Any, token: int) -> tuple[str, str, bool]:
    piece = tokenizer.id_to_piece(token)
    if token == BOS_ID:
        return piece, "BOS", True
    if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
        return piece, "control", False
    if tokenizer.is_byte(token):
        return piece, "byte fallback", piece == "<0x0A>"
    text = piece.replace(SPACE_MARK, " ")
    return repr(text), _class_of(text), text.rstrip(" ").rstrip(CLOSING).endswith(ENDS)


def _class_of(text: str) -> str:
    word = text.strip()
    if not word:
        return "white space"
    if not any(character.isalnum() for character in word):
        return "punctuation"
    if word.isdigit():
        return "digits"
    return "word start" if text[0].isspace() else "continuation"

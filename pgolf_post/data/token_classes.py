"""Token classes: the kind of text that each piece of a vocabulary stands for.

Where a model loses is mostly a question of what is being predicted: the start of a word is guessed from meaning, its
continuation from spelling. Embedding norms and losses are therefore told apart by class. A piece has exactly one:

    control        BOS and other control pieces, unknown, unused
    byte           byte fallback
    digit          digits alone, with or without a leading space
    punctuation    no letter and no digit: marks, line breaks, spaces
    word start     opens a word: a leading space, then a letter among its text
    continuation   everything else: letters without a leading space
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from pgolf_post.data.tokenizer import SPACE_MARK

TokenClass = Literal["control", "byte", "digit", "punctuation", "word start", "continuation"]
TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)


def token_classes(tokenizer: Any) -> np.ndarray:  # (vocab_size,) uint8, an index into TOKEN_CLASSES
    """Return the class of each piece of a sentencepiece processor."""
    names = (class_of(tokenizer, token) for token in range(tokenizer.vocab_size()))
    return np.array([TOKEN_CLASSES.index(name) for name in names], dtype=np.uint8)


def class_of(tokenizer: Any, token: int) -> TokenClass:
    """Return the class of one piece."""
    if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
        return "control"
    return "byte" if tokenizer.is_byte(token) else class_of_text(tokenizer.id_to_piece(token))


def class_of_text(piece: str) -> TokenClass:
    """Return the class of a piece that stands for text, from the piece with its space marks."""
    text = piece.replace(SPACE_MARK, "")
    if not any(character.isalnum() for character in text):
        return "punctuation"
    if all(character.isdigit() for character in text):
        return "digit"
    return "word start" if piece.startswith(SPACE_MARK) else "continuation"

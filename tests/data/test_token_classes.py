"""Token classes: every piece has exactly one, and it is the one that people would give it."""

from __future__ import annotations

import numpy as np
import pytest

from pgolf_post.data import DataFolder
from pgolf_post.data.token_classes import TOKEN_CLASSES, class_of_text, token_classes
from pgolf_post.data.tokenizer import BOS_ID


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("▁the", "word start"),
        ("ing", "continuation"),
        ("▁42", "digit"),
        ("7", "digit"),
        ("▁", "punctuation"),
        ("▁▁▁", "punctuation"),
        (".", "punctuation"),
        ("▁(", "punctuation"),
        ("\n", "punctuation"),
        ("x2", "continuation"),
        ("▁é", "word start"),
        ("▁½", "word start"),  # a number character that is no digit
        ("語", "continuation"),
    ],
    ids=lambda text: repr(text),
)
def test_the_class_of_a_piece_of_text(piece: str, expected: str) -> None:
    assert class_of_text(piece) == expected


def test_every_piece_of_a_vocabulary_has_a_class(pico_data: DataFolder) -> None:
    classes = token_classes(pico_data.tokenizer)
    assert classes.shape == (pico_data.vocab_size,)
    assert TOKEN_CLASSES[classes[BOS_ID]] == "control"
    bytes_found = np.flatnonzero(classes == TOKEN_CLASSES.index("byte"))
    assert len(bytes_found) == 256
    assert {TOKEN_CLASSES[index] for index in np.unique(classes)} == set(TOKEN_CLASSES)

"""The validation text of a round: whole documents from its start, the same for every tokenizer.

A number of tokens is another text under another tokenizer, so a share of the text is a share of its original bytes, to
the end of a document. What the bytes of its documents are, in order, says that two data folders hold one text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.errors import MismatchError


@dataclass(frozen=True)
class ScoredText:
    """The documents that are scored: how many, their tokens with a BOS before each, and what names them."""

    tokens: int
    documents: int
    sha256: str  # of the bytes of each document


def scored_text(data: DataFolder, share: float) -> ScoredText:
    """Return the least number of whole documents that hold a share of the validation text, 0 < share ≤ 1.

    Where a tokenizer loses some of its text, a byte sidecar has the original's bytes; without one the text counts as
    another. Raises MismatchError for a text that does not begin with BOS.
    """
    tokens = data.tokens("val")
    starts = np.flatnonzero(tokens == BOS_ID)
    if not len(starts) or starts[0] != 0:
        raise MismatchError(f"{data.path}: the validation text does not begin with BOS (token id {BOS_ID})")
    documents = np.add.reduceat(data.token_bytes("val", tokens), starts)  # (documents,) bytes
    held = np.cumsum(documents)
    count = int(np.searchsorted(held, share * held[-1])) + 1
    ends = [*starts[1:].tolist(), len(tokens)]
    digest = hashlib.sha256(documents[:count].astype("<i8").tobytes()).hexdigest()
    return ScoredText(ends[count - 1], count, digest)

"""Cutting documents at blank lines: more, smaller clusters where a text has few documents.

A confidence interval needs observations that are independent of each other. Documents are; where a validation text has
only some dozens of them, pieces of a few kilobytes cut where the author began something new are the next best thing.
A piece ends before the token that would make it longer than the limit: after the last blank line in it, else after the
last line end, else right there.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from pgolf_post.data import DataFolder
from pgolf_post.data.tokenizer import SPACE_MARK
from pgolf_post.score.bpb import documents_of

MAX_PIECE_BYTES = 4096


def cut_documents(
    data: DataFolder,
    tokens: np.ndarray,  # (n,) BOS before each document
    token_bytes: np.ndarray,  # (n,) int64
    max_bytes: int = MAX_PIECE_BYTES,
) -> np.ndarray:  # (n,) int64
    """Return the piece in which each token stands, counted through the text; no piece spans two documents."""
    quality = break_quality(data.tokenizer, tokens)
    document = documents_of(tokens)
    bounds = [0, *(np.flatnonzero(np.diff(document)) + 1).tolist(), len(tokens)]
    starts = np.zeros(len(tokens), dtype=bool)
    for first, last in pairwise(bounds):
        starts[_piece_starts(quality[first:last], token_bytes[first:last], max_bytes) + first] = True
    starts[:1] = False
    return np.cumsum(starts)


def _piece_starts(
    quality: np.ndarray,  # (n,) of a break after each token: 2 blank line, 1 line end, 0 neither
    token_bytes: np.ndarray,  # (n,)
    max_bytes: int,
) -> np.ndarray:
    """Return where the pieces of one document start."""
    ends = np.cumsum(token_bytes)
    starts = [0]
    while True:
        start = starts[-1]
        before = int(ends[start] - token_bytes[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))  # first that does not fit
        if stop >= len(ends):
            return np.array(starts)
        room = quality[start:stop]
        best = int(room.max())
        last = int(np.flatnonzero(room == best)[-1]) if best else len(room) - 1
        starts.append(start + last + 1)


def break_quality(tokenizer: Any, tokens: np.ndarray) -> np.ndarray:  # (n,) → (n,) int64
    """Return how good a break after each token is: 2 where a blank line ends, 1 where a line does, 0 elsewhere."""
    kinds = np.array([_line_ends(piece) for piece in _pieces(tokenizer)])  # (vocab_size, 3) bool
    ends_line, ends_blank_line, is_space = (kinds[:, column][tokens] for column in range(3))
    after_line = np.concatenate([[False], ends_line[:-1]])
    return np.where(ends_line, 1 + (ends_blank_line | (is_space & after_line)), 0)


def _pieces(tokenizer: Any) -> list[bytes]:
    """Return the bytes of each token id, leading space included."""
    pieces = []
    for token in range(tokenizer.vocab_size()):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            pieces.append(b"")
        elif tokenizer.is_byte(token):
            pieces.append(bytes([int(tokenizer.id_to_piece(token)[3:5], 16)]))
        else:
            pieces.append(tokenizer.id_to_piece(token).replace(SPACE_MARK, " ").encode("utf-8"))
    return pieces


def _line_ends(piece: bytes) -> tuple[bool, bool, bool]:
    """Return whether a piece ends a line, whether it ends a blank line on its own, whether it is white space alone."""
    ends_line, tail = piece.endswith(b"\n"), piece[len(piece.rstrip()) :]
    return ends_line, ends_line and tail.count(b"\n") > 1, not piece.strip()

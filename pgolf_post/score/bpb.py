"""Bits per byte, and the sums it is made of.

bpb = Σ nats / ln 2 / Σ bytes of the original UTF-8 text. Sums are kept per document (float64 nats, integer tokens,
integer bytes) and divided once, so that any two scores of the same text can be compared document by document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import MismatchError


@dataclass(frozen=True)
class Score:
    """Per-document sums of one pass over a text, in the order in which the documents stand in it."""

    document_nats: np.ndarray  # (documents,) float64
    document_tokens: np.ndarray  # (documents,) int64
    document_bytes: np.ndarray  # (documents,) int64
    seconds: float

    @property
    def nats(self) -> float:
        return math.fsum(self.document_nats)

    @property
    def tokens(self) -> int:
        return int(self.document_tokens.sum())

    @property
    def bytes(self) -> int:
        return int(self.document_bytes.sum())

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def sums(self) -> dict[str, Any]:
        """The JSON facts of a score."""
        return {"bpb": self.bpb, "nats": self.nats, "tokens": self.tokens, "bytes": self.bytes}

    def save(self, path: Path) -> None:
        """Write the per-document sums as safetensors. Raises OSError, for atomic_folder to report."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        arrays = {"nats": self.document_nats, "tokens": self.document_tokens, "bytes": self.document_bytes}
        try:
            save_file(arrays, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def per_document(
    tokens: np.ndarray,  # (n,) the text, BOS before each document
    target_nats: np.ndarray,  # (scored,) float64, for targets 1 .. scored
    token_bytes: np.ndarray,  # (n,) int64
    seconds: float,
) -> Score:
    """Sum per-target nats into documents. Target t is tokens[t]; it belongs to the document it stands in.

    Raises MismatchError if the scored text holds no bytes.
    """
    scored = len(target_nats)
    starts = tokens[: scored + 1] == BOS_ID
    starts[0] = False  # the text opens document 0, with or without a BOS
    document = np.cumsum(starts)[1:]
    count = int(document.max()) + 1 if scored else 0
    sums = [np.bincount(document, weights, minlength=count) for weights in (target_nats, token_bytes[1 : scored + 1])]
    if scored == 0 or sums[1].sum() == 0:
        raise MismatchError(f"the scored text ({scored} tokens) stands for no bytes; bits per byte is undefined")
    return Score(sums[0], np.bincount(document, minlength=count), sums[1].astype(np.int64), seconds)

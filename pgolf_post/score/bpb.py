"""Bits per byte, and the sums it is made of.

bpb = Σ nats / ln 2 / Σ bytes of the original UTF-8 text. Sums (float64 nats, integer tokens, integer bytes) are kept
per unit and divided once, so that any two scores of the same text can be compared. A unit is what one window holds of
one document, or of one piece of a document where the text is cut finer: the most that is scored together and belongs
together. Sums by document, by piece or by window are sums over units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.storage import disk_errors
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import DamagedFileError, MismatchError, NumericsError


@dataclass(frozen=True)
class Score:
    """Sums of one pass over a text, unit by unit in the order in which they were scored."""

    window: np.ndarray  # (units,) int64, place of the unit's window in the text's list of windows
    document: np.ndarray  # (units,) int64, counted from 0 in the text
    piece: np.ndarray  # (units,) int64, counted from 0 in the text; the document itself where it was not cut
    unit_nats: np.ndarray  # (units,) float64
    unit_tokens: np.ndarray  # (units,) int64
    unit_bytes: np.ndarray  # (units,) int64
    seconds: float

    @cached_property
    def document_nats(self) -> np.ndarray:  # (documents,) float64
        return np.bincount(self.document, self.unit_nats)

    @cached_property
    def document_tokens(self) -> np.ndarray:  # (documents,) int64
        return np.bincount(self.document, self.unit_tokens).astype(np.int64)

    @cached_property
    def document_bytes(self) -> np.ndarray:  # (documents,) int64
        return np.bincount(self.document, self.unit_bytes).astype(np.int64)

    @property
    def nats(self) -> float:
        return math.fsum(self.document_nats)

    @property
    def tokens(self) -> int:
        return int(self.unit_tokens.sum())

    @property
    def bytes(self) -> int:
        return int(self.unit_bytes.sum())

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def sums(self) -> dict[str, Any]:
        """Return bpb and the sums it is made of, as JSON facts."""
        return {"bpb": self.bpb, "nats": self.nats, "tokens": self.tokens, "bytes": self.bytes}

    def save(self, path: Path) -> None:
        """Write sums by document and by unit as safetensors. Raises OSError, for atomic_folder to report."""
        from safetensors.numpy import save_file

        documents = {"nats": self.document_nats, "tokens": self.document_tokens, "bytes": self.document_bytes}
        units = {f"unit.{key}": array for key, array in self._units().items()}
        with disk_errors():
            save_file({**documents, **units}, path, {"seconds": repr(self.seconds)})

    def _units(self) -> dict[str, np.ndarray]:
        place = {"window": self.window, "document": self.document, "piece": self.piece}
        return {**place, "nats": self.unit_nats, "tokens": self.unit_tokens, "bytes": self.unit_bytes}

    @classmethod
    def load(cls, path: Path) -> Score:
        """Read what `save` wrote. Raises DamagedFileError."""
        from safetensors import SafetensorError, safe_open

        names = ("window", "document", "piece", "nats", "tokens", "bytes")
        try:
            with safe_open(path, "np") as file:
                seconds = float((file.metadata() or {})["seconds"])
                window, document, piece, nats, tokens, counts = (file.get_tensor(f"unit.{name}") for name in names)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DamagedFileError(f"{path} is not a score's sums: {error}", hint="score again with --fresh") from None
        return cls(window, document, piece, nats, tokens, counts, seconds)


def documents_of(tokens: np.ndarray) -> np.ndarray:  # (n,) → (n,) int64
    """Return the document in which each token stands: BOS opens one, and belongs to it; the first has one or not."""
    starts = np.asarray(tokens == BOS_ID)
    starts[:1] = False
    return np.cumsum(starts)


def require_finite(
    tokens: np.ndarray,  # (n,) the text
    places: np.ndarray,  # (k,) int64, places of targets in it
    nats: np.ndarray,  # (k,)
) -> None:
    """Raise NumericsError naming the first target whose nats are NaN or infinite, and its document."""
    bad = np.flatnonzero(~np.isfinite(nats))
    if len(bad):
        place = int(places[bad[0]])
        raise NumericsError(
            f"the score of target {place} (document {int(documents_of(tokens)[place])}, token id {int(tokens[place])}) "
            f"is {float(nats[bad[0]])}; {len(bad)} of {len(places)} scored together are not finite",
            hint="look for NaN or infinity in the weights, or lower the learning rate of test-time training",
        )


def sum_units(
    tokens: np.ndarray,  # (n,) the text, BOS before each document
    targets: np.ndarray,  # (scored,) int64, places of the scored tokens in the text
    windows: np.ndarray,  # (scored,) int64, the window in which each was scored; ascending within a run
    target_nats: np.ndarray,  # (scored,) float64
    token_bytes: np.ndarray,  # (n,) int64
    seconds: float,
    pieces: np.ndarray | None = None,  # (n,) int64, the piece of a document in which each token stands
) -> Score:
    """Sum the nats of targets into units: runs of targets in one window and one piece.

    Raises MismatchError if the scored text holds no bytes.
    """
    if len(targets) == 0 or token_bytes[targets].sum() == 0:
        raise MismatchError(f"the scored text ({len(targets)} tokens) stands for no bytes; bits per byte is undefined")
    document = documents_of(tokens)[targets]
    piece = document if pieces is None else pieces[targets]
    new = (np.diff(windows) != 0) | (np.diff(piece) != 0) | (np.diff(document) != 0)
    first = np.flatnonzero(np.concatenate([[True], new]))
    sums = [np.add.reduceat(values, first) for values in (target_nats, np.ones_like(targets), token_bytes[targets])]
    return Score(windows[first], document[first], piece[first], sums[0], sums[1], sums[2].astype(np.int64), seconds)

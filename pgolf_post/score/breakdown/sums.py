"""Sums by document and bin, and how they are kept: `breakdown.safetensors` beside a score's own sums.

The bins of one kind add up to the score to the last bit. Float64 sums depend on their order; so each document's nats
are shared out among its bins in units of the last place of the document's own sum: partial sums are rounded to that
unit, and the few units that are left over go to the document's largest bin. Any order of adding then gives the
document's sum exactly, and the sum over documents is the score's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.storage import disk_errors
from pgolf_post.errors import DamagedFileError, NotFoundError, VerificationError
from pgolf_post.score.bpb import Score, documents_of
from pgolf_post.score.breakdown.details import Details
from pgolf_post.score.breakdown.kinds import KINDS, Targets
from pgolf_post.score.breakdown.token_text import TokenText

FILE = "breakdown.safetensors"
FORMAT = 1
COUNTS = ("tokens", "bytes", "top1", "top5")  # integer sums of a cell
SUMS = ("nats", "confidence", *COUNTS)


@dataclass(frozen=True)
class BinSums:
    """Sums over one bin of the whole text."""

    name: str
    nats: float
    tokens: int
    bytes: int
    top1: int  # targets that were the most likely token
    top5: int  # targets with fewer than five tokens more likely
    confidence: float  # Σ probability of the most likely token

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def facts(self) -> dict[str, Any]:
        """Return the sums as JSON facts."""
        counts = {"nats": self.nats, "tokens": self.tokens, "bytes": self.bytes, "top1": self.top1, "top5": self.top5}
        return {"bin": self.name, **counts, "confidence": self.confidence}


@dataclass(frozen=True)
class Cells:
    """Sums of one kind by document and bin, of the cells that hold a target; arrays are (cells,)."""

    names: tuple[str, ...]  # of bins
    document: np.ndarray  # int32
    bin: np.ndarray  # int16
    sums: dict[str, np.ndarray]  # by SUMS: float64 and int32

    def of_bins(self) -> list[BinSums]:
        """Return the sums of every bin that holds a target, in the order of names."""
        return [self._of_bin(number) for number in np.unique(self.bin)]

    def _of_bin(self, number: int) -> BinSums:
        own = self.bin == number
        nats, confidence = (math.fsum(self.sums[name][own]) for name in ("nats", "confidence"))
        counts = {name: int(self.sums[name][own].sum(dtype=np.int64)) for name in COUNTS}
        return BinSums(self.names[number], nats, confidence=confidence, **counts)

    def by_document(self, bin_name: str, name: str, documents: int) -> np.ndarray:  # (documents,) float64
        """Return one of a bin's sums by document; zeros if there is no such bin."""
        if bin_name not in self.names:
            return np.zeros(documents)
        own = self.bin == self.names.index(bin_name)
        return np.bincount(self.document[own], self.sums[name][own], minlength=documents)


@dataclass(frozen=True)
class Breakdown:
    """A score by bins: cells of every kind, all of them adding up to the same score."""

    kinds: dict[str, Cells]

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.kinds["calibration"].of_bins())

    @property
    def top1_accuracy(self) -> float:
        """Share of targets that were the most likely token."""
        return sum(one.top1 for one in self.kinds["calibration"].of_bins()) / self.tokens

    @property
    def top5_accuracy(self) -> float:
        """Share of targets with fewer than five tokens more likely."""
        return sum(one.top5 for one in self.kinds["calibration"].of_bins()) / self.tokens

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean over targets of their bin's |accuracy - confidence|."""
        return sum(abs(one.top1 - one.confidence) for one in self.kinds["calibration"].of_bins()) / self.tokens

    def summary(self) -> dict[str, Any]:
        """Return JSON facts for the score's meta.json and the ledger: accuracies, and nats per token of every bin."""
        accuracies = {"top1_accuracy": self.top1_accuracy, "top5_accuracy": self.top5_accuracy}
        by_bin = {
            kind: {one.name: one.nats_per_token for one in cells.of_bins()}
            for kind, cells in self.kinds.items()
            if kind != "confusions"
        }
        return {**accuracies, "calibration_error": self.calibration_error, "nats_per_token": by_bin}

    def save(self, path: Path) -> None:
        """Write all cells as safetensors. Raises OSError, for atomic_folder to report."""
        from safetensors.numpy import save_file

        arrays: dict[str, np.ndarray] = {}
        for kind, cells in self.kinds.items():
            own = {"document": cells.document, "bin": cells.bin, **cells.sums}
            arrays |= {f"{kind}.{name}": np.ascontiguousarray(array) for name, array in own.items()}
        names = {kind: cells.names for kind, cells in self.kinds.items()}
        with disk_errors():
            save_file(arrays, path, {"format": str(FORMAT), "names": json.dumps(names)})

    @classmethod
    def load(cls, path: Path) -> Breakdown:
        """Read what `save` wrote. Raises NotFoundError if there is none, DamagedFileError."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise NotFoundError(f"{path.parent} holds a score without a breakdown", hint="pgolf-post eval --breakdown")
        try:
            with safe_open(path, "np") as file:
                names = json.loads((file.metadata() or {})["names"])
                kinds = {
                    kind: Cells(
                        tuple(own),
                        file.get_tensor(f"{kind}.document"),
                        file.get_tensor(f"{kind}.bin"),
                        {name: file.get_tensor(f"{kind}.{name}") for name in SUMS},
                    )
                    for kind, own in names.items()
                }
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DamagedFileError(f"{path} is not a breakdown: {error}", hint="score again with --fresh") from None
        return cls(kinds)


def break_down(
    score: Score,
    details: Details,  # of the same pass, closed
    tokens: np.ndarray,  # (n,) the text
    token_bytes: np.ndarray,  # (n,) int64
    tokenizer: Any,  # a sentencepiece processor
) -> Breakdown:
    """Sum a score's targets by bins of every kind. Raises VerificationError if they do not add up to the score."""
    targets = Targets(tokens.astype(np.int64), details, TokenText.from_tokenizer(tokenizer))
    document = documents_of(tokens)[targets.places]
    values = {
        "nats": details.nats,
        "confidence": targets.confidence,
        "tokens": np.ones(len(document)),
        "bytes": token_bytes[targets.places],
        "top1": targets.top1,
        "top5": targets.top5,
    }
    return Breakdown({kind: _cells(score, *row.bins(targets), document, values) for kind, row in KINDS.items()})


def _cells(
    score: Score,
    bins: np.ndarray,  # (k,) int64
    names: list[str],
    document: np.ndarray,  # (k,) int64
    values: dict[str, np.ndarray],  # by SUMS, (k,) each
) -> Cells:
    cells, of_cell = np.unique(document * len(names) + bins, return_inverse=True)
    sums = {name: np.bincount(of_cell, values[name].astype(np.float64)) for name in SUMS}
    cell_document = cells // len(names)
    sums["nats"] = share_out(score.document_nats, cell_document, sums["nats"])
    whole = {name: sums[name].astype(np.int32 if name in COUNTS else np.float64) for name in SUMS}
    made = Cells(tuple(names), cell_document.astype(np.int32), (cells % len(names)).astype(np.int16), whole)
    _require_sum(score, made)
    return made


def share_out(
    document_nats: np.ndarray,  # (documents,) float64
    document: np.ndarray,  # (cells,) int64, ascending
    nats: np.ndarray,  # (cells,) float64, sums that add up to the documents' but for rounding
) -> np.ndarray:  # (cells,) float64
    """Return the cells' nats in units of the last place of their document's sum, adding up to it exactly."""
    unit = np.where(document_nats != 0, np.spacing(np.abs(document_nats)), 1.0)
    shared = np.rint(nats / unit[document]) * unit[document]
    left_over = document_nats - np.bincount(document, shared, minlength=len(document_nats))
    order = np.lexsort((shared, document))  # of each document, the largest cell last
    last = np.concatenate([np.flatnonzero(np.diff(document)), [len(document) - 1]])
    largest = order[last]
    shared[largest] += left_over[document[largest]]
    return shared


def _require_sum(score: Score, cells: Cells) -> None:
    documents = len(score.document_nats)
    for name, own in (
        ("nats", score.document_nats),
        ("tokens", score.document_tokens),
        ("bytes", score.document_bytes),
    ):
        sums = np.bincount(cells.document, cells.sums[name], minlength=documents)
        if not np.array_equal(sums, own):
            place = int(np.argmax(sums != own))
            raise VerificationError(
                f"the bins of document {place} hold {sums[place]!r} {name}, its score {own[place]!r}",
                hint="score again with --fresh",
            )

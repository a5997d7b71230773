"""The ways to bin the targets of a text. A new kind is one function and one row of KINDS.

A function returns the bin of each target and the names of the bins. Bins of one kind are disjoint and cover all
targets, so that their sums add up to the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.score.bpb import documents_of
from pgolf_post.score.breakdown.details import Details
from pgolf_post.score.breakdown.token_text import CLASSES, TokenText

DECILES = 10
CONFUSIONS = 200  # pairs kept by name


@dataclass(frozen=True)
class Targets:
    """The scored targets of a text, with what is known of each; arrays are (k,) in the order of the text."""

    tokens: np.ndarray  # (n,) int64, the whole text
    details: Details
    text: TokenText

    @property
    def places(self) -> np.ndarray:
        return self.details.places

    @cached_property
    def actual(self) -> np.ndarray:  # int64
        return self.tokens[self.places].astype(np.int64)

    @cached_property
    def previous(self) -> np.ndarray:  # int64
        return self.tokens[self.places - 1].astype(np.int64)

    @cached_property
    def document_start(self) -> np.ndarray:  # int64, place of the first token of the target's document
        document = documents_of(self.tokens)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(document)) + 1])
        return starts[document[self.places]]

    @cached_property
    def context(self) -> np.ndarray:  # int64
        return self.details.context[self.places]

    @cached_property
    def guess(self) -> np.ndarray:  # int64
        return self.details.guess[self.places]

    @cached_property
    def confidence(self) -> np.ndarray:  # float64
        return self.details.confidence[self.places]

    @cached_property
    def top1(self) -> np.ndarray:  # bool
        return self.guess == self.actual

    @cached_property
    def top5(self) -> np.ndarray:  # bool
        return self.details.rank[self.places] < 5


Bins = tuple[np.ndarray, list[str]]  # the bin of each target, (k,) int64; names of the bins


def _powers_of_two(counts: np.ndarray) -> Bins:
    """Bin counts from 0: 0, 1, 2-3, 4-7 …"""
    bins = np.frexp(counts.astype(np.float64))[1].astype(np.int64)
    last = int(bins.max(initial=0))
    names = ["0", "1", *(f"{1 << (power - 1)}-{(1 << power) - 1}" for power in range(2, last + 1))]
    return bins, names[: last + 1]


def by_position(targets: Targets) -> Bins:
    """Bin by tokens of context in the window."""
    return _powers_of_two(targets.context)


def by_document_place(targets: Targets) -> Bins:
    """Bin by tokens of the document before the target; 0 is its BOS."""
    return _powers_of_two(targets.places - targets.document_start)


def by_token_class(targets: Targets) -> Bins:
    """Bin by what the token is to a reader."""
    return targets.text.token_class[targets.actual], list(CLASSES)


def by_sentence(targets: Targets) -> Bins:
    """Bin by whether the token opens a document, follows the end of a sentence or line, or stands within one."""
    opens = (targets.previous == BOS_ID) | (targets.actual == BOS_ID)
    after = targets.text.ends_sentence[targets.previous]
    return np.where(opens, 0, np.where(after, 1, 2)), ["document's edge", "after a sentence's end", "within a sentence"]


def by_repeat(targets: Targets) -> Bins:
    """Bin by whether the token, and it after the same one, stood in this document's part of the window before."""
    since = np.maximum(targets.places - targets.context, targets.document_start)
    tokens = targets.tokens.astype(np.int64)
    pairs = np.concatenate([[-1], tokens[:-1] * (int(tokens.max()) + 1) + tokens[1:]])
    seen = _last_before(tokens)[targets.places] >= since
    in_pair = _last_before(pairs)[targets.places] > since
    return np.where(in_pair, 2, np.where(seen, 1, 0)), ["new", "repeated", "repeated after the same token"]


def _last_before(keys: np.ndarray) -> np.ndarray:  # (n,) → (n,) int64
    """Return the place of the last equal key before each; -1 where there is none."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(np.diff(keys[order]) == 0) + 1
    last = np.full(len(keys), -1, dtype=np.int64)
    last[order[same]] = order[same - 1]
    return last


def by_frequency(targets: Targets) -> Bins:
    """Bin by how frequent the token is in the scored text; each bin holds about a tenth of the targets."""
    counts = np.bincount(targets.actual)
    order = np.argsort(-counts, kind="stable")
    middle = np.cumsum(counts[order]) - counts[order] / 2
    decile = np.empty(len(counts), dtype=np.int64)
    decile[order] = np.minimum(DECILES - 1, DECILES * middle / len(targets.actual)).astype(np.int64)
    names = [f"decile {number}" for number in range(1, DECILES + 1)]
    names[0], names[-1] = f"{names[0]}, most frequent", f"{names[-1]}, rarest"
    return decile[targets.actual], names


def by_confidence(targets: Targets) -> Bins:
    """Bin by the probability of the most likely token, in tenths."""
    bins = np.clip((DECILES * targets.confidence).astype(np.int64), 0, DECILES - 1)
    return bins, [f"{10 * number}-{10 * number + 10} %" for number in range(DECILES)]


def by_confusion(targets: Targets) -> Bins:
    """Bin by pairs of most likely and actual token; the CONFUSIONS pairs that cost most nats have names."""
    wrong = np.flatnonzero(~targets.top1)
    vocab_size = len(targets.text.shown)
    pairs, of_pair = np.unique(targets.guess[wrong] * vocab_size + targets.actual[wrong], return_inverse=True)
    cost = np.bincount(of_pair, targets.details.nats[wrong], minlength=len(pairs))
    costly = np.argsort(-cost, kind="stable")[:CONFUSIONS]
    bin_of_pair = np.ones(len(pairs), dtype=np.int64)
    bin_of_pair[costly] = 2 + np.arange(len(costly))
    bins = np.zeros(len(targets.actual), dtype=np.int64)
    bins[wrong] = bin_of_pair[of_pair]
    shown = targets.text.shown
    named = [f"{shown[pair // vocab_size]} for {shown[pair % vocab_size]}" for pair in pairs[costly].tolist()]
    return bins, ["right", "all other pairs", *_distinct(named)]


def _distinct(names: list[str]) -> list[str]:
    """Return names with a number after any that occurred before: two ids can have one text."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    bins: Callable[[Targets], Bins]
    title: str  # of its table, for people
    of_text: bool  # bins depend on text and protocol alone, not on the model


KINDS: dict[str, Kind] = {
    "position": Kind(by_position, "tokens of context in the window", True),
    "token-class": Kind(by_token_class, "class of token", True),
    "sentence": Kind(by_sentence, "place in the sentence", True),
    "repeat": Kind(by_repeat, "new or repeated in the context", True),
    "document": Kind(by_document_place, "tokens of the document before it", True),
    "frequency": Kind(by_frequency, "frequency in the scored text", True),
    "calibration": Kind(by_confidence, "probability of the most likely token", False),
    "confusions": Kind(by_confusion, "most likely token, for the actual one", False),
}

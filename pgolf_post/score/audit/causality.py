"""Tests of causality: what comes before a token may not depend on it, by a single bit.

"Before" is the order of scoring, which length-sorted queues permute by document; what was learned on the way counts.
The log of commits tells both, so a protocol of any kind is tested alike, whatever its settings are called. One that
learns nothing may score windows in any order, each reading what stands before it in the text: then "before" is the
text's order. Either way one order holds for all tests, so the distributions multiply to one over whole texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from pgolf_post.data import BOS_ID
from pgolf_post.families import ModelFamily
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import Observer
from pgolf_post.score.protocols import Protocol, run_protocol
from pgolf_post.score.session import Session

TOLERANCE = 1e-4  # nats, where other documents or lengths are batched otherwise

Run = Callable[[np.ndarray, Observer | None], CommitLog]  # tokens (n,) → a complete log
Advance = Callable[..., None]  # called after each run


@dataclass
class Audited:
    """A model under a protocol: what is audited."""

    module: Any
    isolates_documents: bool
    protocol: Protocol
    run: Run

    @classmethod
    def of(cls, module: Any, family: ModelFamily, isolates_documents: bool, protocol: Protocol) -> Self:
        """Return a model under one of our protocols."""

        def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
            return run_protocol(module, family, tokens, protocol, Session(observer=observer, quiet=True))[0]

        return cls(module, isolates_documents, protocol, run)


@dataclass
class Baseline:
    """A run on the unchanged text, with which runs on changed ones are compared."""

    audited: Audited
    tokens: np.ndarray  # (n,)
    log: CommitLog
    observer: Observer
    order: np.ndarray  # (targets,) int64: what may depend on what, see `causal_order`

    @cached_property
    def rank(self) -> np.ndarray:  # (n,) int64: how many targets come before each; meaningless elsewhere
        rank = np.zeros(len(self.tokens), dtype=np.int64)
        rank[self.order] = np.arange(len(self.order))
        return rank

    def rerun(self, tokens: np.ndarray) -> tuple[CommitLog, np.ndarray]:
        """Score another text. Returns its log, and how much each target's distribution moved, in nats, (n,) float64."""
        observer = watch(np.array(sorted(self.observer.watched)), self.tokens)  # the same rows: others round otherwise
        log = self.audited.run(tokens, observer)
        moved = movement(self.observer.own, observer.own) + movement(self.observer.mark, observer.mark)
        return log, np.pad(moved, (0, len(self.tokens) - len(moved)))


def watch(places: np.ndarray, tokens: np.ndarray) -> Observer:
    """Return an observer of what sums up distributions, that keeps none of them whole."""
    return Observer(places, tokens, whole=np.array([], dtype=np.int64))


def movement(one: np.ndarray, other: np.ndarray) -> np.ndarray:  # both (n,)
    """Return absolute differences: 0 where both are equal or both unknown, infinite where only one is a number."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.nan_to_num(np.abs(one - other), nan=np.inf))


def scoring_order(log: CommitLog) -> np.ndarray:  # (targets,) int64
    """Return targets in the order in which they were scored; those of one commit by their place."""
    targets = np.flatnonzero(log.scored)
    return targets[np.lexsort((targets, log.turn[targets]))]


def causal_order(audited: Audited, log: CommitLog, random: np.random.Generator) -> np.ndarray:  # (targets,) int64
    """Return targets in an order in which none should depend on a later one: that of scoring, or that of the text.

    The text's is taken where targets were scored otherwise, the log tells of no learning, and the first half of the
    text does not move with the second. All tests hold in that order then, so a wrong choice fails them.
    """
    order = scoring_order(log)
    if log.handed_out or in_text_order(log):
        return order
    by_place = np.sort(order)
    early, late = np.array_split(by_place, 2)
    again = audited.run(rewritten(log.tokens, late, random), None)
    return by_place if np.array_equal(again.nats[early], log.nats[early]) else order


def in_text_order(log: CommitLog) -> bool:
    """Return whether targets were scored from the first to the last, as the log tells."""
    return bool(np.all(np.diff(scoring_order(log)) > 0))


def earlier_than(log: CommitLog, place: int) -> np.ndarray:  # int64
    """Return the targets scored before one."""
    order = scoring_order(log)
    return order[: int(np.flatnonzero(order == place)[0])]


def spread(order: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:  # (≤ count,) int64
    """Draw targets, one in each of `count` equal parts of the scoring order."""
    parts = np.array_split(order, min(count, len(order)))
    return np.array([int(random.choice(part)) for part in parts], dtype=np.int64)


def rewritten(tokens: np.ndarray, places: np.ndarray, random: np.random.Generator) -> np.ndarray:  # (n,), int64 → (n,)
    """Return a text whose tokens at some places are others that occur in it, BOS apart, each a different one."""
    kinds = np.setdiff1d(np.unique(tokens), [BOS_ID])
    if len(kinds) < 2:
        kinds = np.union1d(kinds, [0, 2])
    others = np.roll(kinds, int(random.integers(1, len(kinds))))
    changed = tokens.copy()
    places = places[tokens[places] != BOS_ID]
    changed[places] = others[np.searchsorted(kinds, tokens[places])]
    return changed


def another_token(tokens: np.ndarray, place: int, random: np.random.Generator) -> int:
    """Draw a token that occurs in the text and is neither BOS nor the one at this place; 0 or 2 if none does."""
    candidates = np.setdiff1d(np.unique(tokens), [BOS_ID, tokens[place]])
    if not len(candidates):
        return 0 if int(tokens[place]) else 2
    return int(random.choice(candidates))


def flip(base: Baseline, place: int, random: np.random.Generator) -> tuple[bool, str]:
    """Change one token. Returns whether everything before it stayed bit for bit, and the evidence."""
    changed = base.tokens.copy()
    changed[place] = another_token(base.tokens, place, random)
    log, shift = base.rerun(changed)
    early = base.order[: base.rank[place]]
    moved = np.flatnonzero(log.nats[early] != base.log.nats[early])
    if not len(moved) and shift[place] == 0:
        return True, f"{len(early):,} earlier targets"
    return (
        False,
        f"token {place} changed: {len(moved)} earlier scores moved, its own distribution by {shift[place]:.2g}",
    )


def boundary_flips(base: Baseline, random: np.random.Generator) -> tuple[bool, str]:
    """Change one BOS into a token, and one token into BOS, where a text is scored from its first to its last token.

    Elsewhere documents are structure, by which protocols may sort. Documents may be batched otherwise, so what comes
    before is the same to within rounding. Returns whether it is, and the evidence, empty where there is nothing to say.
    """
    if not in_text_order(base.log):
        return True, ""
    marks = base.order[base.tokens[base.order] == BOS_ID]
    others = base.order[base.tokens[base.order] != BOS_ID]
    outcomes = [_boundary_flip(base, kind, random) for kind in (marks, others) if len(kind)]
    failed = [evidence for passed, evidence in outcomes if not passed]
    tested = [evidence for passed, evidence in outcomes if passed and evidence]
    return not failed, failed[0] if failed else "; ".join(tested)


def _boundary_flip(base: Baseline, places: np.ndarray, random: np.random.Generator) -> tuple[bool, str]:
    place = int(random.choice(places))
    is_bos = int(base.tokens[place]) == BOS_ID
    changed = base.tokens.copy()
    changed[place] = another_token(base.tokens, place, random) if is_bos else BOS_ID
    log, shift = base.rerun(changed)
    if not in_text_order(log):
        return True, ""
    early = base.order[: base.rank[place]]
    worst = max(float(np.abs(log.nats[early] - base.log.nats[early]).max(initial=0.0)), float(shift[place]))
    what = f"BOS {place} made a token" if is_bos else f"token {place} made BOS"
    return worst < TOLERANCE, f"{what}: nothing before it moved by more than {worst:.1g} nats"


def truncation(base: Baseline, cuts: np.ndarray, random: np.random.Generator, advance: Advance) -> Finding:
    """Test that no target depends on what comes after it: all that is overwritten, from each cut on, and cut off.

    Nothing before a cut may move, however far before it: a target that looks ahead by a hundred tokens is found by
    any cut within them. `cuts` are ranks in the order of the baseline.
    """
    for cut in cuts.tolist():
        failure = _overwritten(base, cut, random)
        advance()
        if failure:
            return Finding("truncation", False, failure)
    evidence = f"all tokens after {len(cuts)} places overwritten in turn; no score or distribution before them moved"

    # the text is cut off after whole windows, where its length alone decides nothing
    seq_len = base.audited.protocol.seq_len
    short = base.tokens[: 1 + len(base.order) // 2 // seq_len * seq_len]
    why = _why_not_cut(base.log, short, seq_len)
    if why:
        return Finding("truncation", True, f"{evidence}; not cut off: {why}")
    cut_log = base.audited.run(short, None)
    worst = float(np.abs(cut_log.nats - base.log.nats[: len(short)]).max())
    evidence += f"; cut off after {len(short) - 1:,} targets: largest change {worst:.1g} nats"
    return Finding("truncation", worst < TOLERANCE, evidence)


def _overwritten(base: Baseline, cut: int, random: np.random.Generator) -> str:
    """Overwrite the target at a rank and all later ones. Returns what moved before them; empty if nothing did."""
    late = base.order[cut:]
    log, shift = base.rerun(rewritten(base.tokens, late, random))
    moved = (log.nats != base.log.nats) | (shift > 0)
    early = base.order[:cut][moved[base.order[:cut]]]
    if not len(early) and not shift[base.order[cut]]:
        return ""
    evidence = f"{len(late):,} tokens overwritten; {len(early):,} of {cut:,} earlier scores or distributions moved"
    evidence += "" if len(early) else f", and the distribution that predicts token {base.order[cut]}"
    read = early[np.isin(early - 1, late)]  # their inputs: the tokens before them
    if len(read) and not in_text_order(base.log):
        evidence += f"; target {read[0]} stands behind token {read[0] - 1}, which is scored later: where something is "
        evidence += "learned on the way, a window may only read what has been scored"
    return evidence


def _why_not_cut(log: CommitLog, short: np.ndarray, seq_len: int) -> str:
    """Return why a shorter text cannot be compared, by what the log tells was done; empty where it can."""
    if log.handed_out:
        return "what is learned, and on which schedule, may depend on the number of documents"
    if not in_text_order(log):
        return "the text's end is not what is scored last"
    return "" if len(short) > seq_len else "the excerpt's first half has no whole window"

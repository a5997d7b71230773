"""Tests of causality: what was scored before a token may not depend on it, by a single bit.

"Before" is the order of scoring, which length-sorted queues permute by document; what was learned on the way counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pgolf_post.data import BOS_ID
from pgolf_post.families import ModelFamily
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import Observer
from pgolf_post.score.protocols import Protocol, run_protocol
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.settings import TTTProtocol

TOLERANCE = 1e-4  # nats, where a cut-off text is batched otherwise

Run = Callable[[np.ndarray, Observer | None], CommitLog]  # tokens (n,) → a complete log


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


def choose_flips(log: CommitLog, count: int, random: np.random.Generator) -> np.ndarray:  # (≤ count,) int64
    """Draw targets that are not BOS, which is structure: one in each of `count` equal parts of the scoring order."""
    order = [int(place) for place in scoring_order(log) if log.tokens[place] != BOS_ID]
    parts = np.array_split(np.array(order), min(count, len(order)))
    return np.array([int(random.choice(part)) for part in parts])


def scoring_order(log: CommitLog) -> np.ndarray:  # (targets,) int64
    """Return targets in the order in which they were scored; those of one commit by their place."""
    targets = np.flatnonzero(log.scored)
    return targets[np.lexsort((targets, log.turn[targets]))]


def earlier_than(log: CommitLog, place: int) -> np.ndarray:  # int64
    """Return the targets scored before one."""
    order = scoring_order(log)
    return order[: int(np.flatnonzero(order == place)[0])]


def another_token(log: CommitLog, place: int, random: np.random.Generator) -> int:
    """Draw a token that occurs in the text and is neither BOS nor the one at this place."""
    candidates = np.setdiff1d(np.unique(log.tokens), [BOS_ID, log.tokens[place]])
    return int(random.choice(candidates))


def flips(
    audited: Audited,
    tokens: np.ndarray,  # (n,)
    base: CommitLog,
    observer: Observer,  # what `base` showed at the places and some more
    places: np.ndarray,  # (k,) targets to change, one at a time
    random: np.random.Generator,
    advance: Callable[..., None],
) -> Finding:
    """Test that no score before a changed token moves, nor the distribution that predicts it."""
    outcomes = []
    for place in places.tolist():
        outcomes.append(_flip(audited, tokens, base, observer, place, random))
        advance()
    failures = [evidence for passed, evidence in outcomes if not passed]
    if failures:
        return Finding("flip", False, failures[0])
    early = ", ".join(evidence for _, evidence in outcomes)
    return Finding("flip", True, f"{len(outcomes)} tokens changed; bit-identical: their distributions and {early}")


def _flip(
    audited: Audited, tokens: np.ndarray, base: CommitLog, observer: Observer, place: int, random: np.random.Generator
) -> tuple[bool, str]:
    """Change one token. Returns whether everything before it stayed, and the evidence."""
    changed = tokens.copy()
    changed[place] = another_token(base, place, random)
    again = Observer(np.array(sorted(observer.watched)))  # the same rows: other shapes, other rounding
    log = audited.run(changed, again)
    early = earlier_than(base, place)
    moved = np.flatnonzero(log.nats[early] != base.nats[early])
    same = np.array_equal(again.log_probs[place], observer.log_probs[place])
    if not len(moved) and same:
        return True, f"{len(early):,} earlier targets"
    shift = float(np.abs(again.log_probs[place] - observer.log_probs[place]).max())
    return False, f"token {place} changed: {len(moved)} earlier scores moved, its own distribution by {shift:.2g}"


def truncation(audited: Audited, tokens: np.ndarray, base: CommitLog, random: np.random.Generator) -> Finding:
    """Test that what was scored in the first half does not depend on the second: overwritten, and cut off."""
    # everything scored after the middle is overwritten, BOS apart
    order = scoring_order(base)
    middle = len(order) // 2
    rest = order[middle:][base.tokens[order[middle:]] != BOS_ID]
    changed = tokens.copy()
    changed[rest] = another_token(base, int(rest[0]), random)
    log = audited.run(changed, None)
    moved = int(np.count_nonzero(log.nats[order[:middle]] != base.nats[order[:middle]]))
    evidence = f"{len(rest):,} tokens overwritten; {moved} of {middle:,} earlier scores moved"

    # a text cut off after whole windows; other documents would be batched otherwise where a model learns
    short = tokens[: 1 + middle // audited.protocol.seq_len * audited.protocol.seq_len]
    if isinstance(audited.protocol, TTTProtocol) or len(short) < 1 + audited.protocol.seq_len:
        return Finding("truncation", moved == 0, evidence)
    cut = audited.run(short, None)
    worst = float(np.abs(cut.nats - base.nats[: len(short)]).max())
    evidence += f"; cut off after {len(short) - 1:,} targets: largest change {worst:.1g} nats"
    return Finding("truncation", moved == 0 and worst < TOLERANCE, evidence)

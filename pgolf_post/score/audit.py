"""The challenge's rules as executable tests, for any model and any protocol.

An audit does not read code, it runs it: the protocol scores an excerpt of the text, then scores it again with tokens
changed that it must not have known yet. What was scored before a change may not move by a single bit, test-time
training included: "before" is the order of scoring, which length-sorted queues permute by document. The other tests
look at the distributions themselves, at the ledger of what was scored and trained on when, at the bytes that the text
is said to have, and at the weights afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pgolf_post.base.progress import progress_bar
from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.errors import MismatchError, VerificationError
from pgolf_post.families import ModelFamily
from pgolf_post.score.byte_ngram import decode_documents
from pgolf_post.score.commits import CommitError, CommitLog
from pgolf_post.score.nats import Observer, distribution
from pgolf_post.score.protocols import Protocol, run_protocol
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.score.ttt.weights import weights_sha256

SUM_TOLERANCE = 1e-4
ISOLATION_TOLERANCE = 1e-3  # nats: the same sums in another order, at another place of the window
PUBLISHED_TOKENS = {62_021_632: "SP1024", 45_508_608: "SP4096", 40_540_160: "SP8192", 47_851_520: "CaseOps"}
PUBLISHED_BYTES = (151_070_000, 151_080_000)
KNOWN_WRONG = {176.33: "the leading space counted twice", 164.59: "case sentinels counted"}  # M bytes

Run = Callable[[np.ndarray, Observer | None], CommitLog]  # tokens (n,) → a complete ledger


@dataclass(frozen=True)
class Finding:
    """One test's outcome; `passed` is None where it does not apply."""

    test: str
    passed: bool | None
    evidence: str

    def facts(self) -> dict[str, Any]:
        return {"test": self.test, "passed": self.passed, "evidence": self.evidence}


@dataclass
class Subject:
    """What is audited."""

    module: Any
    family: ModelFamily
    isolates_documents: bool
    protocol: Protocol
    run: Run

    @classmethod
    def of(cls, module: Any, family: ModelFamily, isolates_documents: bool, protocol: Protocol) -> Subject:
        """A model under one of our protocols."""

        def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
            return run_protocol(module, family, tokens, protocol, Session(observer=observer, quiet=True))[0]

        return cls(module, family, isolates_documents, protocol, run)


def audit(
    subject: Subject,
    tokens: np.ndarray,  # (n,) the excerpt
    samples: int = 4,
    seed: int = 0,
) -> list[Finding]:
    """Every test of behaviour. What cannot even run is the finding of the test that it concerns."""
    random = np.random.default_rng(seed)
    before = weights_sha256(subject.module)
    try:
        with progress_bar("audit", samples + 2) as advance:
            findings = _behaviour(subject, tokens, samples, random, advance)
    except CommitError as error:
        findings = [Finding("score before update", False, str(error))]
    after = weights_sha256(subject.module)
    same = f"sha256 of all weights and buffers {before[:12]} before, {after[:12]} after"
    return [*findings, Finding("weights restored", before == after, same), _isolation(subject, tokens)]


def _behaviour(
    subject: Subject, tokens: np.ndarray, samples: int, random: np.random.Generator, advance: Callable[..., None]
) -> list[Finding]:
    first = subject.run(tokens, None)
    flips = choose_flips(first, samples, random)
    watched = np.unique(np.concatenate([flips, choose_flips(first, 4 * samples, random)]))
    observer = Observer(watched)
    base = subject.run(tokens, observer)
    advance()
    once = Finding("repeatable", bool(np.array_equal(base.nats, first.nats)), _worst(base.nats - first.nats))
    flipped = [_flip(subject, tokens, base, observer, int(place), random, advance) for place in flips]
    cut = _truncation(subject, tokens, base, random)
    advance()
    return [once, _merged("flip", flipped), cut, sums_to_one(base, observer), scored_once(base), ledger_order(base)]


def choose_flips(ledger: CommitLog, count: int, random: np.random.Generator) -> np.ndarray:
    """Some targets that are not BOS, which is structure: one in each of `count` equal parts of the scoring order."""
    order = [int(place) for place in scoring_order(ledger) if ledger.tokens[place] != BOS_ID]
    parts = np.array_split(np.array(order), min(count, len(order)))
    return np.array([int(random.choice(part)) for part in parts])


def scoring_order(ledger: CommitLog) -> np.ndarray:  # (targets,) int64
    """Targets in the order in which they were scored; those of one commit by their place."""
    targets = np.flatnonzero(ledger.scored)
    return targets[np.lexsort((targets, ledger.turn[targets]))]


def earlier_than(ledger: CommitLog, place: int) -> np.ndarray:  # int64
    """Targets scored before one."""
    order = scoring_order(ledger)
    return order[: int(np.flatnonzero(order == place)[0])]


def another_token(ledger: CommitLog, place: int, random: np.random.Generator) -> int:
    """A token that occurs in the text and is neither BOS nor the one at this place."""
    candidates = np.setdiff1d(np.unique(ledger.tokens), [BOS_ID, ledger.tokens[place]])
    return int(random.choice(candidates))


def _flip(
    subject: Subject,
    tokens: np.ndarray,
    base: CommitLog,
    observer: Observer,
    place: int,
    random: np.random.Generator,
    advance: Callable[..., None],
) -> tuple[bool, str]:
    """Change one token: nothing scored before it may move, nor may the distribution that predicts it."""
    changed = tokens.copy()
    changed[place] = another_token(base, place, random)
    again = Observer(np.array(sorted(observer.watched)))  # the same rows: other shapes, other rounding
    ledger = subject.run(changed, again)
    advance()
    early = earlier_than(base, place)
    moved = np.flatnonzero(ledger.nats[early] != base.nats[early])
    same = np.array_equal(again.log_probs[place], observer.log_probs[place])
    if not len(moved) and same:
        return True, f"{len(early):,} earlier targets"
    shift = float(np.abs(again.log_probs[place] - observer.log_probs[place]).max())
    return False, f"token {place} changed: {len(moved)} earlier scores moved, its own distribution by {shift:.2g}"


def _merged(test: str, outcomes: list[tuple[bool, str]]) -> Finding:
    failures = [evidence for passed, evidence in outcomes if not passed]
    if failures:
        return Finding(test, False, failures[0])
    early = ", ".join(evidence for _, evidence in outcomes)
    evidence = f"{len(outcomes)} tokens changed; bit-identical: their distributions and {early}"
    return Finding(test, True, evidence)


def _truncation(subject: Subject, tokens: np.ndarray, base: CommitLog, random: np.random.Generator) -> Finding:
    """Everything scored after the middle is overwritten, BOS apart; what was scored before may not move."""
    order = scoring_order(base)
    middle = len(order) // 2
    rest = order[middle:][base.tokens[order[middle:]] != BOS_ID]
    changed = tokens.copy()
    changed[rest] = another_token(base, int(rest[0]), random)
    ledger = subject.run(changed, None)
    moved = int(np.count_nonzero(ledger.nats[order[:middle]] != base.nats[order[:middle]]))
    evidence = f"{len(rest):,} tokens overwritten; {moved} of {middle:,} earlier scores moved"
    if isinstance(subject.protocol, TTTProtocol):
        return Finding("truncation", moved == 0, evidence)
    short = tokens[: 1 + middle // subject.protocol.seq_len * subject.protocol.seq_len]
    if len(short) < 1 + subject.protocol.seq_len:
        return Finding("truncation", moved == 0, evidence)
    cut = subject.run(short, None)
    worst = float(np.abs(cut.nats - base.nats[: len(short)]).max())
    evidence += f"; cut off after {len(short) - 1:,} targets: largest change {worst:.1g} nats"
    return Finding("truncation", moved == 0 and worst < SUM_TOLERANCE, evidence)


def sums_to_one(ledger: CommitLog, observer: Observer) -> Finding:
    """|Σp - 1| at watched targets, and that their nats are those of the distribution."""
    if not observer.log_probs:
        return Finding("sum to one", False, "the protocol showed no distribution")
    off = {place: abs(math.fsum(np.exp(row)) - 1) for place, row in observer.log_probs.items()}
    place = max(off, key=lambda key: off[key])
    gaps = [abs(-row[int(ledger.tokens[p])] - ledger.nats[p]) for p, row in observer.log_probs.items()]
    evidence = f"{len(off)} distributions: largest |Σp - 1| {off[place]:.1g} (target {place}), "
    evidence += f"largest gap to the score {max(gaps):.1g} nats"
    return Finding("sum to one", bool(max(off[place], *gaps) < SUM_TOLERANCE), evidence)


def scored_once(ledger: CommitLog) -> Finding:
    """Each target has one score."""
    count = int(ledger.scored[1 : ledger.num_targets + 1].sum())
    evidence = f"{count:,} of {ledger.num_targets:,} targets in {ledger.turns:,} commits, each once"
    return Finding("score once", count == ledger.num_targets and not bool(ledger.scored[0]), evidence)


def ledger_order(ledger: CommitLog) -> Finding:
    """Every token that a step used had been scored by then."""
    if not ledger.lessons:
        return Finding("score before update", None, "nothing is trained")
    ahead = [x for x in ledger.lessons if not _was_scored(ledger, x.start, x.stop, x.turn)]
    count = sum(lesson.stop - lesson.start for lesson in ledger.lessons)
    evidence = (
        f"{len(ledger.lessons):,} ranges, {count:,} tokens handed out for training, {len(ahead)} before their score"
    )
    return Finding("score before update", not ahead, evidence)


def _was_scored(ledger: CommitLog, start: int, stop: int, turn: int) -> bool:
    turns = ledger.turn[max(1, start) : stop]
    return bool(np.all((turns >= 0) & (turns < turn)))


def _worst(difference: np.ndarray) -> str:
    return f"run twice, largest difference {float(np.abs(difference).max()):.1g} nats"


# ---- documents -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _isolation(subject: Subject, tokens: np.ndarray) -> Finding:
    """Documents scored alone and packed behind another agree, where the model isolates documents."""
    if not subject.isolates_documents:
        return Finding("document isolation", None, "this model's attention spans documents")
    starts = [*np.flatnonzero(tokens == BOS_ID).tolist(), len(tokens)]
    limit = subject.protocol.seq_len // 2
    pairs = [
        (tokens[a : min(b, a + limit)], tokens[b : min(c, b + limit)])
        for a, b, c in zip(starts, starts[1:], starts[2:], strict=False)
    ][:8]
    if not pairs:
        return Finding("document isolation", False, "the excerpt has no two documents; audit more tokens")
    worst = max(_isolation_gap(subject.module, first, second) for first, second in pairs)
    evidence = f"{len(pairs)} documents alone and behind another: largest difference {worst:.1g} log-probability"
    return Finding("document isolation", worst < ISOLATION_TOLERANCE, evidence)


def _isolation_gap(module: Any, first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference in any token's log-probability over the second of two documents."""

    def log_probs(text: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(text.astype(np.int64)).to(next(module.parameters()).device)
        return distribution(module, module.hidden(ids[None])[0])

    packed = log_probs(np.concatenate([first, second]))[len(first) :]
    return float((packed - log_probs(second)).abs().max())


# ---- text ------------------------------------------------------------------------------------------------------------


def audit_text(data: DataFolder, split: Any, tokens: np.ndarray, token_bytes: np.ndarray) -> list[Finding]:
    """Bytes and documents of a whole split: tokens (n,), token_bytes (n,) as the score counts them."""
    return [_implied_bytes(data, split, tokens, token_bytes), _bos_count(data, split, tokens)]


def _implied_bytes(data: DataFolder, split: Any, tokens: np.ndarray, token_bytes: np.ndarray) -> Finding:
    """val_loss / ln 2 × tokens / bpb is the sum of the byte counts: it must be the text's length."""
    counted = int(token_bytes.sum())
    recorded = int(data.manifest["splits"][split]["num_bytes"])
    has_sidecar = bool(data.manifest["splits"][split].get("byte_sidecars"))
    evidence = f"{counted:,} bytes counted, {recorded:,} recorded"
    passed = counted == recorded
    if not has_sidecar:
        decoded = sum(map(len, decode_documents(data, tokens)))
        evidence += f", {decoded:,} in the decoded text"
        passed = passed and counted == decoded
    else:
        evidence += " (a sidecar counts the text before its transform)"
    published = PUBLISHED_TOKENS.get(len(tokens) - 1) or PUBLISHED_TOKENS.get(len(tokens))
    if published:
        low, high = PUBLISHED_BYTES
        passed = passed and low <= counted <= high
        evidence += f"; published for {published}: {low / 1e6:.2f}-{high / 1e6:.2f} M"
    wrong = [why for value, why in KNOWN_WRONG.items() if abs(counted / 1e6 - value) < 0.02]
    return Finding("implied bytes", passed, evidence + "".join(f"; known wrong value: {why}" for why in wrong))


def _bos_count(data: DataFolder, split: Any, tokens: np.ndarray) -> Finding:
    """As many BOS as documents, and the text begins with one."""
    count, recorded = int(np.count_nonzero(tokens == BOS_ID)), int(data.manifest["splits"][split]["num_documents"])
    begins = len(tokens) > 0 and int(tokens[0]) == BOS_ID
    evidence = f"{count:,} BOS, {recorded:,} documents; the text {'begins' if begins else 'does not begin'} with BOS"
    return Finding("BOS count", begins and count == recorded, evidence)


def excerpt_tokens(protocol: Protocol) -> int:
    """How many tokens an audit needs to see a protocol at work: some windows, or chunks that learn from each other."""
    if isinstance(protocol, TTTProtocol) and protocol.method in ("sgd", "scales"):
        return 1 + max(3 * protocol.chunk_tokens, 4 * protocol.seq_len)
    return 1 + 8 * protocol.seq_len


def require_passed(findings: list[Finding], name: str) -> None:
    """Raise VerificationError naming every test that failed."""
    failed = [finding.test for finding in findings if finding.passed is False]
    if failed:
        raise VerificationError(f"{name} fails {len(failed)} of {len(findings)} tests: {', '.join(failed)}")


def document_excerpt(tokens: np.ndarray, most: int) -> np.ndarray:
    """The beginning of a text, `most` tokens at most. Raises MismatchError if there is nothing to audit."""
    if len(tokens) < 3:
        raise MismatchError(f"{len(tokens)} tokens are too few to audit")
    return tokens[:most]

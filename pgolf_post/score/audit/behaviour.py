"""An audit of a model under a protocol: the challenge's rules, run on an excerpt of the text.

An audit does not read code, it runs it: the protocol scores the excerpt, then scores it again with tokens changed that
it must not have known yet (causality.py). The other tests look at the distributions themselves, at the log of what was
scored and trained on when (commits.py), at documents packed together (isolation.py) and at the weights afterwards. The
text's bytes and documents are tested apart (text.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pgolf_post.base.progress import progress_bar
from pgolf_post.errors import MismatchError
from pgolf_post.score.audit.causality import Audited, choose_flips, flips, truncation
from pgolf_post.score.audit.commits import scored_before_update, scored_once
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.isolation import isolates_documents
from pgolf_post.score.commits import CommitError, CommitLog
from pgolf_post.score.nats import Observer
from pgolf_post.score.protocols import Protocol
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.score.ttt.weights import weights_sha256

SUM_TOLERANCE = 1e-4  # of a sum of probabilities, and in nats


def audit_behaviour(
    audited: Audited,
    tokens: np.ndarray,  # (n,) the excerpt
    samples: int = 4,  # tokens that are changed
    seed: int = 0,
) -> list[Finding]:
    """Run every test of behaviour. A training loop that the log stops is that test's failure."""
    random = np.random.default_rng(seed)
    before = weights_sha256(audited.module)
    try:
        with progress_bar("audit", samples + 2) as advance:
            findings = _behaviour(audited, tokens, samples, random, advance)
    except CommitError as error:
        findings = [Finding("score before update", False, str(error))]
    after = weights_sha256(audited.module)
    same = f"sha256 of all weights and buffers {before[:12]} before, {after[:12]} after"
    isolation = Finding("document isolation", None, "this model's attention spans documents")
    if audited.isolates_documents:
        isolation = isolates_documents(audited.module, tokens, audited.protocol.seq_len)
    return [*findings, Finding("weights restored", before == after, same), isolation]


def _behaviour(
    audited: Audited, tokens: np.ndarray, samples: int, random: np.random.Generator, advance: Callable[..., None]
) -> list[Finding]:
    # twice unchanged: first to know the order of scoring, then watching some distributions
    first = audited.run(tokens, None)
    places = choose_flips(first, samples, random)
    watched = np.unique(np.concatenate([places, choose_flips(first, 4 * samples, random)]))
    observer = Observer(watched)
    base = audited.run(tokens, observer)
    advance()
    worst = float(np.abs(base.nats - first.nats).max())
    repeatable = bool(np.array_equal(base.nats, first.nats))
    once = Finding("repeatable", repeatable, f"run twice, largest difference {worst:.1g} nats")

    # then with tokens changed
    flipped = flips(audited, tokens, base, observer, places, random, advance)
    cut = truncation(audited, tokens, base, random)
    advance()
    return [once, flipped, cut, sums_to_one(base, observer), scored_once(base), scored_before_update(base)]


def sums_to_one(log: CommitLog, observer: Observer) -> Finding:
    """Test that distributions at watched targets sum to one, and that the nats are theirs."""
    if not observer.log_probs:
        return Finding("sum to one", False, "the protocol showed no distribution")
    off = {place: abs(math.fsum(np.exp(row)) - 1) for place, row in observer.log_probs.items()}
    place = max(off, key=lambda key: off[key])
    gaps = [abs(-row[int(log.tokens[p])] - log.nats[p]) for p, row in observer.log_probs.items()]
    evidence = f"{len(off)} distributions: largest |Σp - 1| {off[place]:.1g} (target {place}), "
    evidence += f"largest gap to the score {max(gaps):.1g} nats"
    return Finding("sum to one", bool(max(off[place], *gaps) < SUM_TOLERANCE), evidence)


def excerpt_tokens(protocol: Protocol) -> int:
    """Return how many tokens an audit needs to see a protocol at work: some windows, or chunks it learns from."""
    return protocol.excerpt_tokens if isinstance(protocol, TTTProtocol) else 1 + 8 * protocol.seq_len


def document_excerpt(tokens: np.ndarray, most: int) -> np.ndarray:
    """Return the beginning of a text, `most` tokens at most. Raises MismatchError if there is nothing to audit."""
    if len(tokens) < 3:
        raise MismatchError(f"{len(tokens)} tokens are too few to audit")
    return tokens[:most]

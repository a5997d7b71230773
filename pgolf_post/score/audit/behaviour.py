"""An audit of a model under a protocol: the challenge's rules, run on an excerpt of the text.

An audit does not read code, it runs it: the protocol scores the excerpt, then scores it again with tokens changed that
it must not have known yet: one at a time (causality.py), and many at once to find the rare ones (screening.py). The
other tests look at the distributions themselves (sums.py), at the log of what was scored and trained on when
(commits.py), at documents packed together (isolation.py) and at the weights afterwards. The text's bytes and documents
are tested apart (text.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.data import BOS_ID
from pgolf_post.errors import MismatchError
from pgolf_post.score.audit.causality import (
    Advance,
    Audited,
    Baseline,
    boundary_flips,
    causal_order,
    flip,
    spread,
    truncation,
    watch,
)
from pgolf_post.score.audit.commits import scored_before_update, scored_once
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.isolation import isolates_documents
from pgolf_post.score.audit.screening import RARE, Plan, Suspect, plan_screening, screen
from pgolf_post.score.audit.sums import sums_to_one, watched_targets
from pgolf_post.score.commits import CommitError, ScoreOnceError
from pgolf_post.score.nats import Observer
from pgolf_post.score.protocols import Protocol
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.score.ttt.weights import weights_sha256

POWER = 0.99  # probability with which a fault on RARE of the targets is to be found


def audit_behaviour(
    audited: Audited,
    tokens: np.ndarray,  # (n,) the excerpt
    samples: int = 4,  # tokens that are changed alone; and as many suspects again
    seed: int = 0,
    power: float = POWER,  # probability with which a fault on one target in a hundred is to be found
) -> list[Finding]:
    """Run every test of behaviour. A training loop that the log stops is that test's failure."""
    random = np.random.default_rng(seed)
    before = weights_sha256(audited.module)
    try:
        findings = _behaviour(audited, tokens, samples, power, random)
    except ScoreOnceError as error:
        findings = [Finding("score once", False, str(error))]
    except CommitError as error:
        findings = [Finding("score before update", False, str(error))]
    after = weights_sha256(audited.module)
    same = f"sha256 of all weights and buffers {before[:12]} before, {after[:12]} after"
    isolation = Finding("document isolation", None, "this model's attention spans documents")
    if audited.isolates_documents:
        isolation = isolates_documents(audited.module, tokens, audited.protocol.seq_len)
    return [*findings, Finding("weights restored", before == after, same), isolation]


def _behaviour(
    audited: Audited, tokens: np.ndarray, samples: int, power: float, random: np.random.Generator
) -> list[Finding]:
    # twice unchanged: first to know the order of scoring and the vocabulary, then watching distributions
    peek = Observer(np.array([1]))
    first = audited.run(tokens, peek)
    vocab_size = max((len(row) for row in peek.log_probs.values()), default=1)
    order = causal_order(audited, first, random)
    observer = watch(watched_targets(first, order, vocab_size, power, random), tokens)
    base = Baseline(audited, tokens, audited.run(tokens, observer), observer, order)
    worst = float(np.abs(base.log.nats - first.nats).max())
    repeatable = bool(np.array_equal(base.log.nats, first.nats))
    findings = [Finding("repeatable", repeatable, f"run twice, largest difference {worst:.1g} nats")]

    # then with tokens changed
    plan = plan_screening(base, power, random)
    say(f"{plan.num_runs + 2 * samples + 6} runs at most, to find a fault on {RARE:.0%} of tokens with p {power:g}")
    with progress_bar("audit", samples + plan.num_runs + 1) as advance:
        cut = truncation(base, plan.cuts, random, advance)
        findings += [flips(base, plan, cut, samples, power, random, advance), cut]
    findings.append(sums_to_one(base.log, base.observer, base.order))
    return [*findings, scored_once(base.log, audited.protocol.seq_len), scored_before_update(base.log)]


def flips(
    base: Baseline,
    plan: Plan,
    cut: Finding,  # of the same plan
    samples: int,
    power: float,
    random: np.random.Generator,
    advance: Advance,
) -> Finding:
    """Test that no score before a changed token moves, nor the distribution that predicts it.

    Rare faults are not looked for where texts overwritten after a cut have already shown one.
    """
    outcomes: list[tuple[bool, str]] = []

    # some tokens alone, spread over the order of scoring; BOS, which is structure, only where it can be compared
    for place in spread(base.order[base.tokens[base.order] != BOS_ID], samples, random).tolist():
        outcomes.append(flip(base, place, random))
        advance()
    boundaries = boundary_flips(base, random)
    advance()

    # many together, and alone those at which something moved
    failures = [evidence for passed, evidence in [*outcomes, boundaries] if not passed]
    suspects = [] if failures or not cut.passed else screen(base, plan, random, advance)
    for suspect in suspects[:samples]:
        passed, evidence = flip(base, suspect.place, random)
        failures += [] if passed else [evidence]
    if failures:
        return Finding("flip", False, failures[0])
    early = ", ".join(evidence for _, evidence in outcomes)
    evidence = f"{len(outcomes)} tokens changed; bit-identical: their distributions and {early}"
    evidence += f"; {boundaries[1]}" if boundaries[1] else ""
    if not cut.passed:
        return Finding("flip", True, f"{evidence}; rare faults were not looked for, see truncation")
    return Finding("flip", True, f"{evidence}; {_screened(plan, suspects, samples, power)}")


def _screened(plan: Plan, suspects: Sequence[Suspect], samples: int, power: float) -> str:
    """Return what a screening without a finding says."""
    told = f"{plan.changed:,} of {plan.targets:,} more in {len(plan.runs)} runs"
    if not suspects:
        return f"{told}: nothing moved before them; {plan.told(power)}"
    told += (
        f": {len(suspects)} moved more than those before them, {min(samples, len(suspects))} changed alone: none did"
    )
    if len(suspects) <= samples:
        return f"{told}; {plan.told(power)}"
    least = f"{suspects[samples].ratio:.3g} times as far as learning does"
    return f"{told}; {plan.told(power)}, and where it moves a target {least}"


def excerpt_tokens(protocol: Protocol) -> int:
    """Return how many tokens an audit needs to see a protocol at work: some windows, or chunks it learns from."""
    return protocol.excerpt_tokens if isinstance(protocol, TTTProtocol) else 1 + 8 * protocol.seq_len


def document_excerpt(tokens: np.ndarray, most: int) -> np.ndarray:
    """Return the beginning of a text, `most` tokens at most. Raises MismatchError if there is nothing to audit."""
    if len(tokens) < 3:
        raise MismatchError(f"{len(tokens)} tokens are too few to audit")
    return tokens[:most]

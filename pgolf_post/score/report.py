"""Tables of what scoring and auditing show to people: rows of text, printed by the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgolf_post.score.audit.findings import Finding

SCORE_HEADER, AUDIT_HEADER = ("", "value"), ("test", "", "evidence")
LEARNING = ("optimizer_steps", "trained_parameters", "learned_tokens", "adapters", "phases_run", "global_steps")
WORDS = {True: "pass", False: "FAIL", None: "n/a"}


def learning_facts(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts by which a protocol that learns shows that it did."""
    return {name: score[name] for name in LEARNING if name in score}


def score_rows(score: Mapping[str, Any], cached: bool) -> list[tuple[str, str]]:
    """Return a score's table: bpb, the sums it is made of, what was learned, and seconds per phase."""
    rows = [("bits per byte", f"{score['bpb']:.6f}"), ("nats per token", f"{score['nats'] / score['tokens']:.6f}")]
    rows += [("tokens", f"{score['tokens']:,}"), ("bytes of text", f"{score['bytes']:,}")]
    rows += [("documents", f"{score['documents']:,}")]
    rows += [(name.replace("_", " "), f"{value:,}") for name, value in learning_facts(score).items()]
    for key, value in score.items():
        if key.endswith("_seconds") and not key.startswith(("strict", "convention")):
            rows.append((f"{key.removesuffix('_seconds')}, s", f"{value:.1f}"))
    if "strict_seconds" in score:
        rows.append(("strict sum, s of 600", f"{score['strict_seconds']:.1f}"))
        rows.append(("by convention (score + adapt), s of 600", f"{score['convention_seconds']:.1f}"))
    return [*rows, ("from cache", "yes" if cached else "no")]


def audit_rows(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """Return an audit's table: each test, its outcome and the evidence."""
    return [(finding.test, WORDS[finding.passed], finding.evidence) for finding in findings]

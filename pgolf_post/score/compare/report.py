"""Tables of what comparisons show to people: rows of text, printed by `compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.documents import SignTest
from pgolf_post.score.compare.paired import Difference
from pgolf_post.score.compare.record import RECORD_MARGIN_NATS, RecordVerdict
from pgolf_post.score.compare.screen import Screening

Rows = list[tuple[str, str]]

HEADER = ("", "value")


def paired_rows(
    candidate: Score, control: Score, by_t: Difference, by_bootstrap: Difference, signs: SignTest, level: float
) -> Rows:
    """Return the table of a comparison paired by document."""
    percent = f"{100 * level:g} %"
    rows = [("candidate, bpb", f"{candidate.bpb:.6f}"), ("control, bpb", f"{control.bpb:.6f}")]
    rows += [("difference", f"{by_t.bpb:+.6f}"), (f"t interval, {percent}", f"{by_t.low:+.6f} … {by_t.high:+.6f}")]
    rows += [(f"bootstrap over documents, {percent}", f"{by_bootstrap.low:+.6f} … {by_bootstrap.high:+.6f}")]
    rows += [("documents better / worse", f"{signs.better:,} / {signs.worse:,}"), ("sign test, p", f"{signs.p:.2g}")]
    return [*rows, ("documents (as many equal ones)", f"{by_t.clusters:,} ({by_t.effective_clusters:.0f})")]


def record_rows(candidate: np.ndarray, control: np.ndarray, verdict: RecordVerdict) -> Rows:
    """Return the table of the record rule over bpb of seeds, (seeds,) each."""
    zero, margin = verdict.against_zero, verdict.against_margin
    rows = [
        (f"{name}, mean of {len(seeds)}", f"{seeds.mean():.7f} ± {seeds.std(ddof=1):.7f}")
        for name, seeds in (("candidate", candidate), ("control", control))
    ]
    nats = zero.difference * math.log(2) * verdict.bytes_per_token
    rows += [("difference, bpb", f"{zero.difference:+.7f}"), ("difference, nats per token", f"{nats:+.6f}")]
    rows += [("Welch t, degrees of freedom", f"{zero.t:.2f}, {zero.degrees:.2f}"), ("p, one-sided", f"{zero.p:.4f}")]
    rows += [(f"p that it is better by {RECORD_MARGIN_NATS} nats ({margin.margin:.5f} bpb)", f"{margin.p:.4f}")]
    rows += [("three seeds each", "yes" if verdict.enough_seeds else "no")]
    return [*rows, ("a record by the rule", "yes" if verdict.is_record else "no")]


def screening_rows(
    screening: Screening,
    level: float,
    expected: Mapping[str, Any],  # what goes with an expected difference; empty for a measured one
) -> Rows:
    """Return the table of a screening."""
    last, kind = screening.last, "expected difference" if expected else "difference"
    rows = [(f"{kind}, bpb", f"{last.bpb:+.6f}")]
    rows += [(f"interval, {100 * level:g} %", f"{screening.low:+.6f} … {screening.high:+.6f}")]
    rows += _expected_rows(expected) if expected else []
    share = f"{100 * last.tokens / screening.total_tokens:.1f} %"
    rows += [("tokens", f"{last.tokens:,} of {screening.total_tokens:,} ({share})")]
    rows += [("windows, looks", f"{last.windows:,}, {len(screening.looks):,}")]
    return [*rows, ("stopped because", screening.reason)]


def _expected_rows(facts: Mapping[str, Any]) -> Rows:
    def shown(name: str, sign: str = "+") -> str:
        return f"{facts[f'{name}_bpb']:{sign}.6f} ± {facts[f'{name}_half_bpb']:.6f}"

    return [
        ("candidate's divergence from the reference, bpb", shown("candidate_divergence", "")),
        ("control's", shown("control_divergence", "")),
        ("measured on the same windows", shown("measured")),
        ("measured less expected; by chance up to", shown("surprise")),
    ]

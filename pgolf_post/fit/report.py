"""Tables of `fit`: one row per budget, seconds on training data, κ, and where the bytes went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgolf_post.artifacts import PackedArtifact
from pgolf_post.average.report import held_up
from pgolf_post.average.search import Search
from pgolf_post.base.progress import print_table, say
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.fit.after_fit import AfterFit
from pgolf_post.fit.explain import by_role, explain
from pgolf_post.fit.prepare import Fitter, tune_seconds
from pgolf_post.pack.report.size import SizeReport

SUGGESTED_TOKENS, SUGGESTED_CALIBRATION_TOKENS = 1 << 20, 1 << 18
BUDGETS_HEADER = (
    "budget", "artifact", "code", "headroom", "bits/weight", "c", "predicted nats", "bpb", "seconds", "builds",
)  # fmt: skip
ZEROS_HEADER = ("stored as zeros", "role", "weights", "why", "predicted nats")
EXPLAINED_HEADER = ("tensor", "role", "weights", "bits/weight", "share of bits", "predicted nats", "nats per 100 KB")
AFTER_FIT_HEADER = (
    "average", "bpb before", "gap", "bpb expected", "artifact", "statistics s", "fit s", "scoring s", "bytes on disk",
)  # fmt: skip


def facts_of(artifact: PackedArtifact, report: SizeReport, score: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return one budget's artifact for machines."""
    meta = artifact.meta
    weights = sum(int(tensor["weights"]) for tensor in meta["tensors"])
    sums = {key: score[key] for key in ("bpb", "nats", "tokens", "bytes")} if score else {}
    return {
        **sums,
        "artifact": str(artifact.path),
        **report.facts(),
        "bits_per_weight": 8 * report.artifact_bytes / weights,
        "constant": meta["constant"],
        "predicted_nats": meta["predicted_nats"],
        "equal_slope_nats": meta["equal_slope_nats"],
        "builds": meta["builds"],
        "zeros": [tensor for tensor in meta["tensors"] if tensor["method"] == "zeros"],
        "symbols_sha256": artifact.symbols_sha256,
        "artifact_cached": artifact.cached,
        "fit_seconds": meta["seconds"],
        **{key: meta[key] for key in ("regularized", "fine_tuned", "distilled") if key in meta},
        "train_seconds": meta["train_seconds"],  # as making it took them: the clock of a cached one has not seen all
    }


def longest(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds on training data, by step, of the budget that took most."""
    spent: dict[str, float] = max((answer["train_seconds"] for answer in answers), key=_total)
    return spent


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def show_training(fitter: Fitter, seconds: Mapping[str, float]) -> None:
    """Print the seconds on training data by step, what more of them would buy, and κ."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    say(f"{_total(seconds):.1f} s on training data ({parts or 'nothing'}): the challenge counts them as training")
    stats = fitter.stats
    if stats.num_tokens < SUGGESTED_CALIBRATION_TOKENS:
        more = stats.seconds * (SUGGESTED_CALIBRATION_TOKENS / stats.num_tokens - 1)
        say(
            f"--calibration-tokens {SUGGESTED_CALIBRATION_TOKENS}: a lower loss at the same bytes, for about "
            f"{more:,.0f} s more"
        )
    if not fitter.settings.tune_tokens:
        more = tune_seconds(stats, SUGGESTED_TOKENS)
        say(f"--tune-tokens {SUGGESTED_TOKENS}: a lower loss at the same bytes, for about {more:,.0f} s more")
    if fitter.kappas:
        header = (fitter.settings.kappa, "predicted nats", "divergence", "± 2 s.e.", "κ used")
        rows = [
            (group, f"{k.predicted:.6f}", f"{k.measured:.6f}", f"{2 * k.error:.6f}", f"{k.kappa:.3f}")
            for group, k in fitter.kappas.items()
        ]
        print_table("What quantizing one alone costs, against its prediction", header, rows)


def show_budgets(answers: Sequence[Mapping[str, Any]], has_code: bool) -> None:
    """Print one row per budget, and where each artifact lies."""
    rows = [
        (
            *(f"{answer[key]:,}" for key in ("budget_bytes", "artifact_bytes", "code_bytes", "headroom_bytes")),
            f"{answer['bits_per_weight']:.3f}",
            f"{answer['constant']:.3e}",
            f"{answer['predicted_nats']:.5f}",
            f"{answer['bpb']:.5f}" if "bpb" in answer else "",
            f"{answer['fit_seconds']:.1f}",
            str(answer["builds"]),
        )
        for answer in answers
    ]
    print_table("" if has_code else "no --code given: code counted as 0 bytes", BUDGETS_HEADER, rows)
    for answer in answers:
        if chosen := answer.get("regularized"):
            pair = f"C × {chosen['coupling']:g} off its diagonal, ridge {chosen['ridge']:g}"
            say(f"least divergence at {answer['budget_bytes']:,} bytes: {pair}")
        say(answer["artifact"])


def show_zeros(answers: Sequence[Mapping[str, Any]]) -> None:
    """Print the matrices that are stored as zeros at any budget, and why, if there are any."""
    zeros = {facts["name"]: facts for answer in reversed(answers) for facts in answer["zeros"]}
    rows = [
        (facts["name"], facts["role"], f"{facts['weights']:,}", facts["reason"], f"{facts['predicted_loss']:.1e}")
        for facts in zeros.values()
    ]
    if rows:
        print_table("", ZEROS_HEADER, rows)


def show_explained(fitter: Fitter, artifact: PackedArtifact) -> None:
    """Print where the bytes went, by tensor and by role, and what more of them would buy."""
    rows = explain(artifact.meta["tensors"], fitter.kappa)
    total = sum(row.bits for row in rows) or 1.0
    for title, table in (("by tensor", rows), ("by role", by_role(rows))):
        cells = [
            (
                row.name,
                row.role,
                f"{row.num_weights:,}",
                f"{row.bits_per_weight:.3f}",
                f"{row.bits / total:.1%}",
                f"{row.loss:.6f}",
                f"{row.slope:.6f}",
            )
            for row in table
        ]
        print_table(f"Where the bytes went, {title}", EXPLAINED_HEADER, cells)


def show_after_fit(final: Checkpoint, search: Search, after: AfterFit) -> None:
    """Print what rounding costs each average of a search, the best first, and what finding out has cost."""
    ordered = sorted(search.candidates, key=lambda candidate: candidate.scored.bpb)
    rows = []
    for candidate in ordered:
        one = after.averages[candidate.name]
        bpb = f"{one.before_bpb:.5f}", f"{one.gap_bpb:+.5f}", f"{candidate.scored.bpb:.5f}"
        seconds = (f"{value:.1f}" for value in one.seconds.values())
        rows.append((candidate.name, *bpb, f"{one.artifact.num_bytes:,}", *seconds, f"{one.disk_bytes:,}"))
    print_table(f"after fit to {after.budget:,} bytes, each on the windows it was scored on", AFTER_FIT_HEADER, rows)
    parts = {part.path: part.path.stat().st_size for candidate in ordered for part in candidate.parts}
    say(f"the averages are made of {len(parts)} files of weights, {sum(parts.values()):,} bytes{held_up(final)}")
    spent, kept = sum(c.seconds for c in ordered), sum(one.disk_bytes for one in after.averages.values())
    say(f"{spent:.1f} s for the search now; {kept:,} bytes of statistics and artifacts are kept")
    say("those of averages that are no checkpoint go with: pgolf-post cache prune --orphans")

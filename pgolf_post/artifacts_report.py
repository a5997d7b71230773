"""Tables of `requant`: the plan, an artifact's tensors with their evidence, totals, and trials side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgolf_post.artifacts import PackedArtifact, is_no_op
from pgolf_post.base.progress import print_table, say
from pgolf_post.calibrate import Stats
from pgolf_post.pack.report.size import SizeReport
from pgolf_post.plan import Plan, TensorPlan
from pgolf_post.rules import GridRule

PLAN_HEADER = ("tensor", "role", "rule", "method", "bits", "scale", "per", "Hessian")
SUMS = ("bpb", "nats", "tokens", "bytes")


@dataclass(frozen=True)
class Trial:
    """One plan and its artifact."""

    name: str  # the flags that make it another than the control; empty if there is one trial
    plan: Plan
    artifact: PackedArtifact
    report: SizeReport
    score: dict[str, Any] | None
    no_op: bool = False  # the control's very model


def compared(trials: Sequence[Trial]) -> list[bool]:
    """Return for each trial whether it is the first, their control, over again."""
    control = trials[0].artifact
    return [False, *(is_no_op(trial.artifact, control) for trial in trials[1:])]


def plan_row(entry: TensorPlan) -> tuple[str, ...]:
    """Return one tensor's line of the table that `--show-plan` prints."""
    rule, named = entry.rule, (entry.name, entry.role, entry.rule.name)
    if not isinstance(rule, GridRule):
        return *named, entry.method, getattr(rule, "dtype", ""), "", "", entry.site or ""
    bits = str(rule.bits) if rule.bits else "unbounded"
    scale = f"{rule.scale} {entry.clip:g}" if rule.reads_clip else rule.scale
    per = f"{rule.per} of {rule.group_size}" if rule.group_size else rule.per
    return *named, entry.method_text, bits, scale, per, entry.site or entry.reason


def show_plan(plan: Plan, entries: Sequence[TensorPlan]) -> None:
    """Print a plan as a table, before any work."""
    print_table(f"plan {plan.name}", PLAN_HEADER, [plan_row(entry) for entry in entries])
    if plan.lqer:
        say(f"then LQER rank {plan.lqer.rank} on the {plan.lqer.top_k} tensors with the largest error")
    if plan.sequential:
        say("block by block, each on Hessians collected under the quantized blocks before it")
    if plan.distill:
        say(f"then {plan.distill.steps} steps of distillation of the floats that are kept")


def show_trial(trial: Trial, has_code: bool) -> None:
    """Print an artifact's tensors with the evidence of each, and its totals."""
    artifact, score = trial.artifact, trial.score
    settings = [key for key in ("bits", "clip") if any(key in facts for facts in artifact.meta["tensors"])]
    rows = [
        (
            facts["name"],
            facts["method"],
            *(f"{facts[key]:g}" if key in facts else "" for key in settings),
            f"{facts['entropy_bits']:.3f}" if "entropy_bits" in facts else "",
            _evidence(facts),
        )
        for facts in artifact.meta["tensors"]
    ]
    print_table("Tensors", ("tensor", "method", *settings, "entropy bits", "Hessian error / damping"), rows)
    totals = [(key.replace("_", " "), f"{value:,}") for key, value in trial.report.facts().items()]
    totals.append(("symbols sha256", artifact.symbols_sha256[:16]))
    if distilled := artifact.meta.get("distill"):
        totals += _distilled(distilled)
    if score:
        totals.append((f"bpb of the decoded artifact ({score['tokens']:,} tokens)", f"{score['bpb']:.5f}"))
    note = "" if has_code else "  (no --code given: code counted as 0 bytes)"
    print_table(f"{artifact.path}{note}", ("", "value"), totals)


def _evidence(facts: Mapping[str, Any]) -> str:
    if facts["method"] == "lqer":
        return f"rank {facts['rank']} takes back {facts['energy_restored']:.0%} of ‖E‖²"
    if "damp_used" not in facts:
        return str(facts.get("reason", ""))
    return f"{facts['error']:.2e} / {facts['damp_used']:g}"


def _distilled(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what distillation did, for the table of totals."""
    verdict = "kept" if facts["kept"] else f"not kept: {facts['reason']}"
    return [
        (f"distillation: {facts['steps']} steps on {facts['parameters']:,} floats", verdict),
        ("held-out KL, nats", f"{facts['kl_before']:.6f} → {facts['kl_after']:.6f}"),
        ("held-out nats per token", f"{facts['nats_before']:.5f} → {facts['nats_after']:.5f}"),
    ]


def show_trials(trials: Sequence[Trial]) -> None:
    """Print all trials in one table, against the first."""
    control, rows = trials[0], []
    for trial in trials:
        bpb = [f"{trial.score['bpb']:.5f}"] if trial.score else []
        if trial.score and control.score:
            bpb.append(f"{trial.score['bpb'] - control.score['bpb']:+.5f}" if trial is not control else "")
        size = trial.report.artifact_bytes
        more = f"{size - control.report.artifact_bytes:+,}" if trial is not control else ""
        rows.append((trial.name, *bpb, f"{size:,}", more, "NO-OP: the control's symbols" if trial.no_op else ""))
    scored = ("bpb", "Δ") if control.score else ()
    print_table(f"Trials; the control is {control.name}", ("", *scored, "artifact bytes", "Δ", ""), rows)


def facts_of(trial: Trial, view_id: str, stats: Stats) -> dict[str, Any]:
    """Return a trial for machines."""
    artifact, plan = trial.artifact, trial.plan
    sums = {key: trial.score[key] for key in SUMS} if trial.score else {}
    return {
        **sums,
        "artifact": str(artifact.path),
        **trial.report.facts(),
        "symbols_sha256": artifact.symbols_sha256,
        "checkpoint_id": view_id,
        "stats_id": stats.id,
        "stats_cached": stats.cached,
        "stale": stats.stale,
        "artifact_cached": artifact.cached,
        "plan": plan.name,
        "settings": plan.identity(),
        "distill": artifact.meta.get("distill"),
        "trial": trial.name,
        "no_op": trial.no_op,
    }

"""`pgolf-post requant`: quantize + pack + size (+ score) a checkpoint, from cached Hessians, in seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.cli.calibrate import CALIBRATION_FLAGS
from pgolf_post.cli.common import (
    allow_stale_option,
    checkpoint_argument,
    data_option,
    dollars_option,
    find_checkpoint,
    find_data,
    fresh_option,
    given_settings,
    json_option,
    load_view,
    settings_options,
    stats_folder,
    weights_option,
)
from pgolf_post.cli.packing import (
    budget_option,
    code_option,
    codec_option,
    eval_option,
    eval_tokens_option,
    record_artifact,
    refuse_idle_eval_tokens,
)
from pgolf_post.cli.plan_options import PLAN_HEADER, chosen_plans, plan_options, plan_row

if TYPE_CHECKING:
    from pgolf_post.artifacts import PackedArtifact
    from pgolf_post.pack.report.size import SizeReport
    from pgolf_post.plan import Plan, TensorPlan


@click.command("requant")
@checkpoint_argument
@weights_option
@plan_options
@click.option("--show-plan", is_flag=True, help="Print what would happen to every tensor, and stop.")
@codec_option
@code_option
@budget_option
@eval_option
@eval_tokens_option
@data_option
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@allow_stale_option
@fresh_option
@dollars_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    show_plan: bool,
    codec: str,
    code: tuple[Path, ...],
    budget: int,
    evaluate: bool,
    eval_tokens: int | None,
    data_dir: Path | None,
    allow_stale: str | None,
    fresh: bool,
    dollars_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize CHECKPOINT by a plan, pack it, decode it again, and count the bytes.

    \b
    pgolf-post requant --lambda 0.1
    pgolf-post requant --lambda 0,0.1,0.4 --eval        a trial of each; one that changes nothing is marked NO-OP
    pgolf-post requant --clip 11.5 --embed-bits 7 --embed-clip 14 --code train_gpt.py --eval
    pgolf-post requant --plan record-1855 --set mlp.clip=11 --show-plan

    Hessians are collected on the first call and read from the cache afterwards. Exit code 3 when over budget (of
    several trials: when the smallest is).
    """
    from pgolf_post.artifacts import plan_text, requant
    from pgolf_post.calibrate import calibrate, stale_stats
    from pgolf_post.pack.container import PackSettings
    from pgolf_post.pack.report.size import count
    from pgolf_post.quantize.gptq.stats_factors import StatsFactors
    from pgolf_post.quantize.model import plan_view
    from pgolf_post.score.cached import score_artifact
    from pgolf_post.score.plain import PlainProtocol
    from pgolf_post.score.pool import ModelPool

    started = time.perf_counter()
    refuse_idle_eval_tokens(evaluate, eval_tokens)
    calibration = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "requant")
    plans = chosen_plans(**options)
    codec = given_settings(PackSettings, {"codec": codec}, "requant").codec
    found = find_checkpoint(checkpoint)
    view = load_view(found, weights)
    if show_plan:
        for _, plan in plans:
            _show_plan(plan, plan_view(view, plan), as_json)
        return
    data = find_data(found, data_dir)
    stats = stale_stats(view, data, allow_stale, calibration) if allow_stale else calibrate(view, data, calibration)
    protocol = PlainProtocol(seq_len=view.train_seq_len, max_tokens=eval_tokens)
    factors, pool, trials = StatsFactors(stats), ModelPool(), []
    for name, plan in plans:
        artifact = requant(view, stats, plan, codec, fresh, factors, plan_text(view, data, plan, calibration))
        report = count(artifact.path, code, budget)
        score = score_artifact(artifact.path, data, protocol, fresh, pool=pool)[0] if evaluate else None
        trials.append(Trial(name, plan, artifact, report, score))
        _show(trials[-1], bool(code))
    no_ops = _no_ops(trials)
    if len(trials) > 1:
        _show_trials(trials, no_ops)
    seconds = round(time.perf_counter() - started, 3)
    for trial in trials:
        made = trial.artifact, trial.report, trial.score
        record_artifact(*made, stats_folder(view, stats), dollars_per_hour, seconds)
    if as_json:
        answers = [_answer(trial, no_op, view.id, stats) for trial, no_op in zip(trials, no_ops, strict=True)]
        print_json({**answers[0], "seconds": seconds, **({"trials": answers} if len(trials) > 1 else {})})
    min((trial.report for trial in trials), key=lambda report: report.total_bytes).require_within_budget()


class Trial(NamedTuple):
    """One plan, and what became of it."""

    name: str  # the flags that make it another than the control; empty if there is one trial
    plan: Plan
    artifact: PackedArtifact
    report: SizeReport
    score: dict[str, Any] | None


def _no_ops(trials: list[Trial]) -> list[bool]:
    """Which trials are the same as the first, their control."""
    from pgolf_post.artifacts import is_no_op

    control = trials[0].artifact
    return [False, *(is_no_op(trial.artifact, control) for trial in trials[1:])]


def _show_trials(trials: list[Trial], no_ops: list[bool]) -> None:
    """All trials in one table, against the first."""
    control, rows = trials[0], []
    for trial, no_op in zip(trials, no_ops, strict=True):
        bpb = [f"{trial.score['bpb']:.5f}"] if trial.score else []
        if trial.score and control.score:
            bpb.append(f"{trial.score['bpb'] - control.score['bpb']:+.5f}" if trial is not control else "")
        size = trial.report.artifact_bytes
        more = f"{size - control.report.artifact_bytes:+,}" if trial is not control else ""
        rows.append((trial.name, *bpb, f"{size:,}", more, "NO-OP: the control's symbols" if no_op else ""))
    scored = ("bpb", "Δ") if control.score else ()
    print_table(f"Trials; the control is {control.name}", ("", *scored, "artifact bytes", "Δ", ""), rows)


def _show_plan(plan: Plan, rows: list[TensorPlan], as_json: bool) -> None:
    """The plan as a table, before any work."""
    print_table(f"plan {plan.name}", PLAN_HEADER, [plan_row(row) for row in rows])
    if plan.lqer:
        say(f"then LQER rank {plan.lqer.rank} on the {plan.lqer.top_k} tensors with the largest error")
    if plan.sequential:
        say("block by block, each on Hessians collected under the quantized blocks before it")
    if plan.distill:
        say(f"then {plan.distill.steps} steps of distillation of the floats that are kept")
    if as_json:
        print_json({"plan": plan.name, "settings": plan.identity(), "tensors": [plan_row(row) for row in rows]})


def _show(trial: Trial, has_code: bool) -> None:
    artifact, report, score = trial.artifact, trial.report, trial.score
    rows = [
        (
            row["name"],
            row["method"],
            *(f"{row[key]:g}" if key in row else "" for key in ("bits", "clip")),
            f"{row['entropy_bits']:.3f}" if "entropy_bits" in row else "",
            _evidence(row),
        )
        for row in artifact.meta["tensors"]
    ]
    print_table("Tensors", ("tensor", "method", "bits", "clip", "entropy bits", "Hessian error / damping"), rows)
    totals = [(key.replace("_", " "), f"{value:,}") for key, value in report.facts().items()]
    totals.append(("symbols sha256", artifact.symbols_sha256[:16]))
    if distilled := artifact.meta.get("distill"):
        totals += _distilled(distilled)
    if score:
        totals.append((f"bpb of the decoded artifact ({score['tokens']:,} tokens)", f"{score['bpb']:.5f}"))
    note = "" if has_code else "  (no --code given: code counted as 0 bytes)"
    print_table(f"{artifact.path}{note}", ("", "value"), totals)


def _distilled(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What distillation did, for the table of totals."""
    verdict = "kept" if facts["kept"] else f"not kept: {facts['reason']}"
    return [
        (f"distillation: {facts['steps']} steps on {facts['parameters']:,} floats", verdict),
        ("held-out KL, nats", f"{facts['kl_before']:.6f} → {facts['kl_after']:.6f}"),
        ("held-out nats per token", f"{facts['nats_before']:.5f} → {facts['nats_after']:.5f}"),
    ]


def _evidence(row: dict[str, Any]) -> str:
    if row["method"] == "lqer":
        return f"rank {row['rank']} takes back {row['energy_restored']:.0%} of ‖E‖²"
    if "damp_used" not in row:
        return str(row.get("reason", ""))
    return f"{row['error']:.2e} / {row['damp_used']:g}"


def _answer(trial: Trial, no_op: bool, view_id: str, stats: Any) -> dict[str, Any]:
    artifact, report, score, plan = trial.artifact, trial.report, trial.score, trial.plan
    sums = {key: score[key] for key in ("bpb", "nats", "tokens", "bytes")} if score else {}
    return {
        **sums,
        "artifact": str(artifact.path),
        **report.facts(),
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
        "no_op": no_op,
    }

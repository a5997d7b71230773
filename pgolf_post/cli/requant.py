"""`pgolf-post requant`: quantize + pack + size (+ score) a checkpoint, from cached Hessians, in seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.calibrate import CalibrationSettings
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
from pgolf_post.cli.plan_options import PLAN_HEADER, chosen_plan, plan_options, plan_row
from pgolf_post.pack.codecs import CHOICES
from pgolf_post.pack.size import BUDGET_BYTES
from pgolf_post.progress import print_json, print_table, say

if TYPE_CHECKING:
    from pgolf_post.pack.size import SizeReport
    from pgolf_post.plan import Plan, TensorPlan
    from pgolf_post.requant import Artifact

COUNTED = ("code_bytes", "total_bytes", "budget_bytes", "headroom_bytes")  # what the artifact's folder does not know


@click.command("requant")
@checkpoint_argument
@weights_option
@plan_options
@click.option("--show-plan", is_flag=True, help="Print what would happen to every tensor, and stop.")
@click.option("--codec", default="rans", show_default=True, help=f"One of {', '.join(CHOICES)}.")
@click.option(
    "--code", multiple=True, type=click.Path(path_type=Path), help="A counted code file or folder; repeatable."
)
@click.option("--budget", default=BUDGET_BYTES, show_default=True, type=click.IntRange(min=0), help="Limit in bytes.")
@click.option("--eval", "evaluate", is_flag=True, help="Score what the artifact decodes to.")
@click.option("--eval-tokens", type=click.IntRange(min=2), help="Score only the first so many validation tokens.")
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
    pgolf-post requant --clip 11.5 --embed-bits 7 --embed-clip 14 --code train_gpt.py --eval
    pgolf-post requant --plan record-1855 --set mlp.clip=11 --show-plan

    Hessians are collected on the first call and read from the cache afterwards. Exit code 3 when over budget.
    """
    from pgolf_post.calibrate import calibrate, stale_stats
    from pgolf_post.families import train_seq_len
    from pgolf_post.ledger.recording import record
    from pgolf_post.pack.container import PackSettings
    from pgolf_post.pack.size import count
    from pgolf_post.quantize.run import plan_view
    from pgolf_post.requant import requant
    from pgolf_post.score.cached import score_artifact
    from pgolf_post.score.plain import PlainProtocol

    started = time.perf_counter()
    calibration = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "requant")
    plan = chosen_plan(**options)
    codec = given_settings(PackSettings, {"codec": codec}, "requant").codec
    found = find_checkpoint(checkpoint)
    view = load_view(found, weights)
    if show_plan:
        _show_plan(plan, plan_view(view, plan), as_json)
        return
    data = find_data(found, data_dir)
    stats = stale_stats(view, data, allow_stale, calibration) if allow_stale else calibrate(view, data, calibration)
    artifact = requant(view, stats, plan, codec, fresh)
    report = count(artifact.path, code, budget)
    protocol = PlainProtocol(seq_len=train_seq_len(view.config), max_tokens=eval_tokens)
    score = score_artifact(artifact.path, data, protocol, fresh)[0] if evaluate else None
    _show(artifact, report, score, bool(code))
    seconds = round(time.perf_counter() - started, 3)
    answer = _answer(artifact, report, score, view.id, stats, plan, seconds)
    folders = [artifact.folder, stats_folder(view, stats), *([Path(score["folder"])] if score else [])]
    record(*folders, facts={key: answer[key] for key in COUNTED}, dollars_per_hour=dollars_per_hour, seconds=seconds)
    if as_json:
        print_json(answer)
    report.require_within_budget()


def _show_plan(plan: Plan, rows: list[TensorPlan], as_json: bool) -> None:
    """The plan as a table, before any work."""
    print_table(f"plan {plan.name}", PLAN_HEADER, [plan_row(row) for row in rows])
    if plan.lqer:
        say(f"then LQER rank {plan.lqer.rank} on the {plan.lqer.top_k} tensors with the largest error")
    if as_json:
        print_json({"plan": plan.name, "settings": plan.identity(), "tensors": [plan_row(row) for row in rows]})


def _show(artifact: Artifact, report: SizeReport, score: dict[str, Any] | None, has_code: bool) -> None:
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
    totals = [("artifact bytes", f"{report.artifact_bytes:,}"), ("code bytes", f"{report.code_bytes:,}")]
    totals += [("total bytes", f"{report.total_bytes:,}"), ("budget bytes", f"{report.budget_bytes:,}")]
    totals += [("headroom bytes", f"{report.headroom_bytes:,}"), ("symbols sha256", artifact.symbols_sha256[:16])]
    if score:
        totals.append((f"bpb of the decoded artifact ({score['tokens']:,} tokens)", f"{score['bpb']:.5f}"))
    note = "" if has_code else "  (no --code given: code counted as 0 bytes)"
    print_table(f"{artifact.path}{note}", ("", "value"), totals)


def _evidence(row: dict[str, Any]) -> str:
    if row["method"] == "lqer":
        return f"rank {row['rank']} takes back {row['energy_restored']:.0%} of ‖E‖²"
    if "damp_used" not in row:
        return str(row.get("reason", ""))
    return f"{row['error']:.2e} / {row['damp_used']:g}"


def _answer(
    artifact: Artifact,
    report: SizeReport,
    score: dict[str, Any] | None,
    view_id: str,
    stats: Any,
    plan: Plan,
    seconds: float,
) -> dict[str, Any]:
    sums = {key: score[key] for key in ("bpb", "nats", "tokens", "bytes")} if score else {}
    return {
        **sums,
        "artifact": str(artifact.path),
        "artifact_bytes": report.artifact_bytes,
        "code_bytes": report.code_bytes,
        "total_bytes": report.total_bytes,
        "budget_bytes": report.budget_bytes,
        "headroom_bytes": report.headroom_bytes,
        "symbols_sha256": artifact.symbols_sha256,
        "checkpoint_id": view_id,
        "stats_id": stats.id,
        "stats_cached": stats.cached,
        "stale": stats.stale,
        "artifact_cached": artifact.cached,
        "plan": plan.name,
        "settings": plan.identity(),
        "seconds": seconds,
    }

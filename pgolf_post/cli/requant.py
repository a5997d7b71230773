"""`pgolf-post requant`: quantize + pack + size (+ score) a checkpoint, from cached Hessians, in seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.cli.calibrate import CALIBRATION_FLAGS
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    find_checkpoint,
    find_data,
    fresh_option,
    given_settings,
    json_option,
    load_view,
    settings_options,
    weights_option,
)
from pgolf_post.pack.codecs import CHOICES
from pgolf_post.pack.size import BUDGET_BYTES
from pgolf_post.plan import QuantizeSettings
from pgolf_post.progress import print_json, print_table

if TYPE_CHECKING:
    from pgolf_post.pack.size import SizeReport
    from pgolf_post.requant import Artifact

QUANTIZE_FLAGS = {
    "bits": "--bits",
    "clip": "--clip",
    "embed_bits": "--embed-bits",
    "embed_clip": "--embed-clip",
    "hessian_lambda": "--lambda",
    "damp": "--damp",
    "act_order": "--act-order",
    "block_size": "--block-size",
}


@click.command("requant")
@checkpoint_argument
@weights_option
@settings_options(QuantizeSettings, QUANTIZE_FLAGS)
@click.option("--codec", default="rans", show_default=True, help=f"One of {', '.join(CHOICES)}.")
@click.option(
    "--code", multiple=True, type=click.Path(path_type=Path), help="A counted code file or folder; repeatable."
)
@click.option("--budget", default=BUDGET_BYTES, show_default=True, type=click.IntRange(min=0), help="Limit in bytes.")
@click.option("--eval", "evaluate", is_flag=True, help="Score what the artifact decodes to.")
@click.option("--eval-tokens", type=click.IntRange(min=2), help="Score only the first so many validation tokens.")
@data_option
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@fresh_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    codec: str,
    code: tuple[Path, ...],
    budget: int,
    evaluate: bool,
    eval_tokens: int | None,
    data_dir: Path | None,
    fresh: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize CHECKPOINT with GPTQ and SDClip, pack it, decode it again, and count the bytes.

    \b
    pgolf-post requant --lambda 0.1
    pgolf-post requant --clip 11.5 --embed-bits 7 --embed-clip 14 --code train_gpt.py --eval

    Hessians are collected on the first call and read from the cache afterwards. Exit code 3 when over budget.
    """
    from pgolf_post.calibrate import calibrate
    from pgolf_post.families import train_seq_len
    from pgolf_post.pack.container import PackSettings
    from pgolf_post.pack.size import count
    from pgolf_post.requant import requant
    from pgolf_post.score.cached import score_artifact
    from pgolf_post.score.plain import PlainProtocol

    started = time.perf_counter()
    settings = given_settings(QuantizeSettings, {key: options[key] for key in QUANTIZE_FLAGS}, "requant")
    calibration = given_settings(CalibrationSettings, {key: options[key] for key in CALIBRATION_FLAGS}, "requant")
    codec = given_settings(PackSettings, {"codec": codec}, "requant").codec
    found = find_checkpoint(checkpoint)
    data = find_data(found, data_dir)
    view = load_view(found, weights)
    stats = calibrate(view, data, calibration)
    artifact = requant(view, stats, settings, codec, fresh)
    report = count(artifact.path, code, budget)
    protocol = PlainProtocol(seq_len=train_seq_len(view.config), max_tokens=eval_tokens)
    score = score_artifact(artifact.path, data, protocol, fresh)[0] if evaluate else None
    _show(artifact, report, score, bool(code))
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        print_json(_answer(artifact, report, score, view.id, stats, settings.model_dump(), seconds))
    report.require_within_budget()


def _show(artifact: Artifact, report: SizeReport, score: dict[str, Any] | None, has_code: bool) -> None:
    rows = [
        (row["name"], row["method"], str(row["bits"]), f"{row['clip']:g}", f"{row['entropy_bits']:.3f}", _evidence(row))
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
    if "error" not in row:
        return str(row.get("reason", ""))
    return f"{row['error']:.2e} / {row['damp_used']:g}"


def _answer(
    artifact: Artifact,
    report: SizeReport,
    score: dict[str, Any] | None,
    view_id: str,
    stats: Any,
    settings: dict[str, Any],
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
        "artifact_cached": artifact.cached,
        "settings": settings,
        "seconds": seconds,
    }

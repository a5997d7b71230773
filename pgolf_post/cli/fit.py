"""`pgolf-post fit`: the lowest loss at a given number of bytes, with no knob to tune."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    code_option,
    eval_option,
    eval_tokens_option,
    record_artifact,
    refuse_idle_eval_tokens,
)
from pgolf_post.errors import SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.report.size import BUDGET_BYTES, SizeReport, count_code

if TYPE_CHECKING:
    from pgolf_post.artifacts import PackedArtifact
    from pgolf_post.fit.prepare import Fitter

SUGGESTED_TOKENS = 1 << 20
FIT_FLAGS = {
    "rows": "--rows",
    "columns": "--columns",
    "row_feedback": "--row-feedback",
    "weighted": "--weighted",
    "trellis_states": "--trellis-states",
    "shrink": "--shrink",
    "zeros": "--zeros",
    "kappa": "--kappa",
    "kappa_tokens": "--kappa-tokens",
    "tune_tokens": "--tune-tokens",
    "distill": "--distill",
    "floats": "--floats",
    "kappa_seed": "--kappa-seed",
}


@click.command("fit")
@checkpoint_argument
@weights_option
@click.option("--budget", type=click.IntRange(min=0), help=f"Bytes of code and artifact.  [default: {BUDGET_BYTES}]")
@click.option("--budgets", metavar="BYTES,…", help="Several budgets from the same statistics: a Pareto front.")
@click.option("--target-gap", type=float, metavar="BPB", help="Find the bytes at which quantizing costs this much.")
@code_option
@click.option("--train-seconds", type=float, help="Leave out steps so that training data is read for no longer.")
@click.option("--explain", "explained", is_flag=True, help="Where the bytes went, and what more would buy, by tensor.")
@eval_option
@eval_tokens_option
@data_option
@settings_options(FitSettings, FIT_FLAGS)
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@allow_stale_option
@fresh_option
@dollars_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    budget: int | None,
    budgets: str | None,
    target_gap: float | None,
    code: tuple[Path, ...],
    train_seconds: float | None,
    explained: bool,
    evaluate: bool,
    eval_tokens: int | None,
    data_dir: Path | None,
    allow_stale: str | None,
    fresh: bool,
    dollars_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn CHECKPOINT into the best artifact that, with its code, fills the budget.

    \b
    pgolf-post fit --budget 16000000 --code train_gpt.py --eval
    pgolf-post fit --budgets 8e6,10e6,12e6,14e6,16e6 --code train_gpt.py
    pgolf-post fit --target-gap 0.005
    pgolf-post fit --explain

    Every weight gets the step size at which one more bit buys the same loss everywhere, solved for the total bytes:
    within 2,000 of the budget, never over. Statistics are collected on the first call and read from the cache
    afterwards; seconds spent on training data are printed, because the challenge counts them. Under torchrun,
    `torchrun --nproc_per_node=N -m pgolf_post fit …`, ranks share the statistics.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.fit.artifact import fit_artifact
    from pgolf_post.fit.target_gap import limit_for_gap
    from pgolf_post.pack.report.size import count

    started = time.perf_counter()
    refuse_idle_eval_tokens(evaluate, eval_tokens)
    given = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "fit")
    settings = given_settings(FitSettings, {key: options.pop(key) for key in FIT_FLAGS}, "fit")
    wanted = chosen_budgets(budget, budgets, target_gap)
    code_bytes = count_code(code)
    found = find_checkpoint(checkpoint)
    view = load_view(found, weights)
    data = find_data(found, data_dir)
    ranks = Ranks.join()
    try:
        fitter = _prepared(view, data, given, settings, train_seconds, allow_stale, fresh, ranks)
    finally:
        ranks.leave()
    if not ranks.is_main:
        return
    if target_gap is not None:
        wanted = [limit_for_gap(fitter, target_gap) + code_bytes]
    answers = []
    for total in wanted:
        artifact = fit_artifact(fitter, _artifact_limit(total, code_bytes), fresh=fresh)
        report = count(artifact.path, code, total)
        score = _score(artifact, data, view.config, eval_tokens, fresh) if evaluate else None
        answers.append(_answer(artifact, report, score))
        stats, seconds = stats_folder(view, fitter.stats), time.perf_counter() - started
        record_artifact(artifact, report, score, stats, dollars_per_hour, seconds)
        if explained:
            _show_explained(fitter, artifact)
    spent = max((answer["train_seconds"] for answer in answers), key=_total)
    _show_training(fitter, spent)
    _show(answers, bool(code))
    if as_json:
        shared = {"checkpoint_id": view.id, "stats_id": fitter.stats.id, "train_seconds": spent}
        shared |= {"kappa": {group: found.facts() for group, found in fitter.kappas.items()}}
        shared["seconds"] = round(time.perf_counter() - started, 3)
        print_json({**shared, **(answers[0] if len(answers) == 1 else {"fits": answers})})


def chosen_budgets(budget: int | None, budgets: str | None, target_gap: float | None) -> list[int]:
    """The totals to solve for. Raises SettingsError if they are asked for in two ways, or are no numbers."""
    if sum(value is not None for value in (budget, budgets, target_gap)) > 1:
        raise SettingsError("--budget, --budgets and --target-gap each say what to solve for; give one of them")
    if budgets is None:
        return [BUDGET_BYTES if budget is None else budget]
    try:
        values = [int(float(text)) for text in budgets.split(",")]
    except (ValueError, OverflowError):
        raise SettingsError(f"--budgets {budgets!r}: numbers of bytes with commas between, such as 8e6,16e6") from None
    if min(values) < 0:
        raise SettingsError(f"--budgets {budgets!r}: {min(values):,} bytes cannot be filled")
    return values


def _prepared(
    view: Any,
    data: Any,
    calibration: CalibrationSettings,
    settings: FitSettings,
    train_seconds: float | None,
    allow_stale: str | None,
    fresh: bool,
    ranks: Any,
) -> Fitter:
    from pgolf_post.calibrate import stale_stats
    from pgolf_post.fit.prepare import prepare
    from pgolf_post.fit.training_clock import TrainingClock

    stats = stale_stats(view, data, allow_stale, calibration) if allow_stale else None
    return prepare(view, data, calibration, settings, TrainingClock(train_seconds), fresh, ranks, stats)


def _artifact_limit(total: int, code_bytes: int) -> int:
    if code_bytes >= total:
        raise SettingsError(f"the code takes {code_bytes:,} of {total:,} bytes: nothing is left for weights")
    return total - code_bytes


def _score(artifact: PackedArtifact, data: Any, config: Any, eval_tokens: int | None, fresh: bool) -> dict[str, Any]:
    from pgolf_post.families import train_seq_len
    from pgolf_post.score.cached import score_artifact
    from pgolf_post.score.plain import PlainProtocol

    protocol = PlainProtocol(seq_len=train_seq_len(config), max_tokens=eval_tokens)
    return score_artifact(artifact.path, data, protocol, fresh)[0]


def _total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


def _show_training(fitter: Fitter, seconds: dict[str, float]) -> None:
    """What reading training data took by step, of the fit that took longest, what more would buy, and κ."""
    from pgolf_post.fit.prepare import tune_seconds

    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    say(f"{_total(seconds):.1f} s on training data ({parts or 'nothing'}): the challenge counts them as training")
    if not fitter.settings.tune_tokens:
        more = tune_seconds(fitter.stats, SUGGESTED_TOKENS)
        say(f"--tune-tokens {SUGGESTED_TOKENS}: a lower loss at the same bytes, for about {more:,.0f} s more")
    if fitter.kappas:
        header = (fitter.settings.kappa, "predicted nats", "divergence", "± 2 s.e.", "κ used")
        rows = [
            (group, f"{k.predicted:.6f}", f"{k.measured:.6f}", f"{2 * k.error:.6f}", f"{k.kappa:.3f}")
            for group, k in fitter.kappas.items()
        ]
        print_table("What quantizing one alone costs, against its prediction", header, rows)


def _answer(artifact: PackedArtifact, report: SizeReport, score: dict[str, Any] | None) -> dict[str, Any]:
    meta = artifact.meta
    weights = sum(int(row["weights"]) for row in meta["tensors"])
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
        "symbols_sha256": artifact.symbols_sha256,
        "artifact_cached": artifact.cached,
        "fit_seconds": meta["seconds"],
        **{key: meta[key] for key in ("fine_tuned", "distilled") if key in meta},
        "train_seconds": meta["train_seconds"],  # as making it took them: the clock of a cached one has not seen all
    }


def _show(answers: list[dict[str, Any]], has_code: bool) -> None:
    header = (
        "budget",
        "artifact",
        "code",
        "headroom",
        "bits/weight",
        "c",
        "predicted nats",
        "bpb",
        "seconds",
        "builds",
    )
    rows = [
        (
            *(f"{row[key]:,}" for key in ("budget_bytes", "artifact_bytes", "code_bytes", "headroom_bytes")),
            f"{row['bits_per_weight']:.3f}",
            f"{row['constant']:.3e}",
            f"{row['predicted_nats']:.5f}",
            f"{row['bpb']:.5f}" if "bpb" in row else "",
            f"{row['fit_seconds']:.1f}",
            str(row["builds"]),
        )
        for row in answers
    ]
    print_table("" if has_code else "no --code given: code counted as 0 bytes", header, rows)
    for row in answers:
        say(row["artifact"])


def _show_explained(fitter: Fitter, artifact: PackedArtifact) -> None:
    from pgolf_post.fit.explain import by_role, explain

    header = ("tensor", "role", "weights", "bits/weight", "share of bits", "predicted nats", "nats per 100 KB")
    rows = explain(artifact.meta["tensors"], fitter.kappa)
    total = sum(row.bits for row in rows)
    for title, table in (("by tensor", rows), ("by role", by_role(rows))):
        print_table(
            f"Where the bytes went, {title}",
            header,
            [
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
            ],
        )

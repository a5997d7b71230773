"""`pgolf-post fit`: the lowest loss at a given number of bytes, with no knob to tune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.cli.calibrate import CALIBRATION_FLAGS
from pgolf_post.cli.common import (
    allow_stale_option,
    checkpoint_argument,
    data_option,
    derived_option,
    dollars_option,
    find_checkpoint,
    find_data,
    fresh_option,
    given_settings,
    json_option,
    load_view,
    quiet_option,
    settings_options,
    stats_folder,
    threads_option,
    weights_option,
)
from pgolf_post.cli.packing import (
    code_option,
    count_and_score,
    eval_option,
    eval_tokens_option,
    record_artifact,
    refuse_idle_eval_tokens,
)
from pgolf_post.errors import SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.report.size import BUDGET_BYTES, count_code

if TYPE_CHECKING:
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.checkpoint import View
    from pgolf_post.data import DataFolder
    from pgolf_post.fit.prepare import Fitter

FIT_FLAGS = {
    "rows": "--rows",
    "columns": "--columns",
    "row_feedback": "--row-feedback",
    "weighted": "--weighted",
    "trellis_states": "--trellis-states",
    "lane_rows": "--lane-rows",
    "shrink": "--shrink",
    "zeros": "--zeros",
    "kappa": "--kappa",
    "kappa_tokens": "--kappa-tokens",
    "tune_tokens": "--tune-tokens",
    "tune_optimizer": "--tune-optimizer",
    "tune_precision": "--tune-precision",
    "tune_source": "--tune-source",
    "distill": "--distill",
    "floats": "--floats",
    "kappa_seed": "--kappa-seed",
    "coupling": "--coupling",
    "lookup_frequency": "--lookup-frequency",
    "regularize": "--regularize",
}


@click.command("fit")
@checkpoint_argument
@weights_option
@click.option(
    "--budget", type=click.IntRange(min=0), help=f"Bytes of code and artifact together.  [default: {BUDGET_BYTES}]"
)
@click.option(
    "--budgets", metavar="BYTES,…", help="Solve for several budgets from the same statistics: a Pareto front."
)
@click.option(
    "--target-gap",
    type=FiniteFloat(),
    metavar="BPB",
    help="Solve for the bytes at which quantizing costs this many bpb.",
)
@code_option
@click.option(
    "--train-seconds",
    type=FiniteFloat(),
    metavar="SECONDS",
    help="Skip optional stages that would read training data for longer than this many seconds.",
)
@click.option(
    "--explain",
    "explained",
    is_flag=True,
    help="Show where the bytes went, and what more of them would buy, by tensor.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the forward passes that measure κ.")
@eval_option
@eval_tokens_option
@data_option
@derived_option
@settings_options(FitSettings, FIT_FLAGS)
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@allow_stale_option
@fresh_option
@dollars_option
@threads_option
@quiet_option
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
    compiled: bool,
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
    `torchrun --nproc_per_node=N -m pgolf_post fit …`, ranks share the statistics, κ and fine-tuning.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.fit.artifact import artifact_limit, fit
    from pgolf_post.fit.limits import require_less_than_fp16
    from pgolf_post.fit.report import facts_of, show_explained
    from pgolf_post.fit.target_gap import limit_for_gap, require_gap
    from pgolf_post.score.plain import PlainProtocol

    # Read what is asked for.
    started = time.perf_counter()
    refuse_idle_eval_tokens(evaluate, eval_tokens)
    calibration = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "fit")
    settings = given_settings(FitSettings, {key: options.pop(key) for key in FIT_FLAGS}, "fit")
    if target_gap is not None:
        require_gap(target_gap)  # before anything is computed
    totals, code_bytes = chosen_budgets(budget, budgets, target_gap), count_code(code)
    home = find_checkpoint(checkpoint)
    view, data = load_view(home, weights), find_data(home, data_dir)
    for total in totals if target_gap is None else []:
        require_less_than_fp16(view, artifact_limit(total, code_bytes))
    ranks = Ranks.join()
    try:
        fitter = prepare_by_all_ranks(
            ranks, view, data, calibration, settings, train_seconds, allow_stale, fresh, compiled
        )
        if fitter is None:
            return

        # Make, score and record one artifact per budget.
        totals = totals if target_gap is None else [limit_for_gap(fitter, target_gap) + code_bytes]
        protocol = PlainProtocol(seq_len=view.train_seq_len, max_tokens=eval_tokens) if evaluate else None
        stats, answers = stats_folder(view, fitter.stats), list[dict[str, Any]]()
        for total in totals:
            artifact = fit(view, data, total, code=code, fresh=fresh, prepared=fitter)
            report, score = count_and_score(artifact, total, code, data, protocol, fresh)
            answers.append(facts_of(artifact, report, score))
            record_artifact(artifact, report, score, stats, dollars_per_hour, time.perf_counter() - started)
            if explained:
                show_explained(fitter, artifact)
        end_tuning(fitter)
    finally:
        ranks.leave()
    show_results(fitter, answers, bool(code), as_json, started)


def prepare_by_all_ranks(
    ranks: Ranks,
    view: View,
    data: DataFolder,
    calibration: CalibrationSettings,
    settings: FitSettings,
    train_seconds: float | None,
    allow_stale: str | None,
    fresh: bool,
    compiled: bool = False,
) -> Fitter | None:
    """Collect statistics and κ on all ranks; return what fits share on the main rank, None on the others.

    Without fine-tuning all ranks have left by then. With it the others return when the main rank calls `end_tuning`.
    """
    from pgolf_post.calibrate import stale_stats
    from pgolf_post.fit.prepare import prepare
    from pgolf_post.fit.training_clock import TrainingClock
    from pgolf_post.fit.tune_ranks import help_tune

    stats = stale_stats(view, data, allow_stale, calibration) if allow_stale else None
    fitter = prepare(view, data, calibration, settings, TrainingClock(train_seconds), fresh, ranks, stats, compiled)
    if fitter.texts is None:
        ranks.leave()
    elif not ranks.is_main:
        help_tune(view, fitter.texts[0], settings.tune_precision, ranks)
    return fitter if ranks.is_main else None


def end_tuning(fitter: Fitter) -> None:
    """Let the ranks go that helped to tune, if there are any."""
    from pgolf_post.fit.tune_ranks import end_help

    if fitter.texts is not None and fitter.ranks.world_size > 1:
        end_help(fitter.ranks)


def show_results(
    fitter: Fitter, answers: Sequence[Mapping[str, Any]], has_code: bool, as_json: bool, started: float
) -> None:
    """Print the seconds on training data, one row per budget and, if asked, all facts for machines."""
    from pgolf_post.fit.report import longest, show_budgets, show_training, show_zeros

    spent = longest(answers)
    show_training(fitter, spent)
    show_zeros(answers)
    show_budgets(answers, has_code)
    if not as_json:
        return
    shared = {
        "checkpoint_id": fitter.view.id,
        "stats_id": fitter.stats.id,
        "train_seconds": spent,
        "kappa": {group: kappa.facts() for group, kappa in fitter.kappas.items()},
        "seconds": round(time.perf_counter() - started, 3),
    }
    print_json({**shared, **(answers[0] if len(answers) == 1 else {"fits": answers})})


def chosen_budgets(budget: int | None, budgets: str | None, target_gap: float | None) -> list[int]:
    """Return the totals to solve for. Raises SettingsError if they are asked for in two ways, or are no numbers."""
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

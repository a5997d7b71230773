"""`pgolf-post requant`: quantize, pack, size and score a checkpoint, from cached Hessians, in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    budget_option,
    code_option,
    codec_option,
    count_and_score,
    eval_option,
    eval_tokens_option,
    record_artifact,
    refuse_idle_eval_tokens,
)
from pgolf_post.cli.plan_options import chosen_plans, plan_options

if TYPE_CHECKING:
    from pgolf_post.artifacts_report import Trial
    from pgolf_post.calibrate import Stats
    from pgolf_post.checkpoint import View
    from pgolf_post.data import DataFolder
    from pgolf_post.plan import Plan
    from pgolf_post.score.protocols import Protocol


@click.command("requant")
@checkpoint_argument
@weights_option
@plan_options
@click.option("--show-plan", "with_plan", is_flag=True, help="Print what would be done to every tensor, and stop.")
@codec_option
@code_option
@budget_option
@eval_option
@eval_tokens_option
@data_option
@derived_option
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
    with_plan: bool,
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
    from pgolf_post.artifacts import plan_calibration
    from pgolf_post.artifacts_report import facts_of, show_trials
    from pgolf_post.calibrate import calibrate, stale_stats
    from pgolf_post.score.plain import PlainProtocol

    # Read what is asked for.
    started = time.perf_counter()
    refuse_idle_eval_tokens(evaluate, eval_tokens)
    given = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "requant")
    plans = chosen_plans(**options)
    calibration = plan_calibration(given, *(plan for _, plan in plans))
    home = find_checkpoint(checkpoint)
    view = load_view(home, weights)
    if with_plan:
        print_plans(view, [plan for _, plan in plans], as_json)
        return

    # Make one artifact per plan.
    data = find_data(home, data_dir)
    stats = stale_stats(view, data, allow_stale, calibration) if allow_stale else calibrate(view, data, calibration)
    protocol = PlainProtocol(seq_len=view.train_seq_len, max_tokens=eval_tokens) if evaluate else None
    trials = run_trials(view, data, stats, plans, calibration, codec, code, budget, protocol, fresh)
    if len(trials) > 1:
        show_trials(trials)

    # Record them in the ledger and, if asked, print them for machines.
    seconds = round(time.perf_counter() - started, 3)
    for trial in trials:
        record_artifact(trial.artifact, trial.report, trial.score, stats_folder(view, stats), dollars_per_hour, seconds)
    if as_json:
        answers = [facts_of(trial, view.id, stats) for trial in trials]
        print_json({**answers[0], "seconds": seconds, **({"trials": answers} if len(trials) > 1 else {})})
    min((trial.report for trial in trials), key=lambda report: report.total_bytes).require_within_budget()


def print_plans(view: View, plans: Sequence[Plan], as_json: bool) -> None:
    """Print what each plan would do to every tensor."""
    from pgolf_post.artifacts_report import plan_row, show_plan
    from pgolf_post.quantize.model import plan_view

    for plan in plans:
        entries = plan_view(view, plan)
        show_plan(plan, entries)
        if as_json:
            rows = [plan_row(entry) for entry in entries]
            print_json({"plan": plan.name, "settings": plan.identity(), "tensors": rows})


def run_trials(
    view: View,
    data: DataFolder,
    stats: Stats,
    plans: Sequence[tuple[str, Plan]],
    calibration: CalibrationSettings,
    codec: str,
    code: Sequence[Path],
    budget: int,
    protocol: Protocol | None,
    fresh: bool,
) -> list[Trial]:
    """Quantize, pack, count and score by each plan, and print each result as it comes.

    Factors of the statistics and the scored module are shared; trials that equal the first are marked as no-ops.
    """
    from pgolf_post.artifacts import plan_text, requant
    from pgolf_post.artifacts_report import Trial, compared, show_trial
    from pgolf_post.quantize.gptq.stats_factors import StatsFactors
    from pgolf_post.score.pool import ModelPool

    factors, pool, trials = StatsFactors(stats), ModelPool(), list[Trial]()
    for name, plan in plans:
        artifact = requant(view, stats, plan, codec, fresh, factors, plan_text(view, data, plan, calibration))
        report, score = count_and_score(artifact, budget, code, data, protocol, fresh, pool)
        trials.append(Trial(name, plan, artifact.forgotten(), report, score))
        show_trial(trials[-1], bool(code))
    return [replace(trial, no_op=no_op) for trial, no_op in zip(trials, compared(trials), strict=True)]

"""`pgolf-post calibrate`: collect statistics once, reuse them for every later experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.calibrate.settings import CalibrationSettings
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

CALIBRATION_FLAGS = {  # for commands that calibrate first
    "tokens": "--calibration-tokens",
    "seed": "--calibration-seed",
    "seq_len": "--calibration-seq-len",
    "source": "--calibration-source",
    "temperature": "--calibration-temperature",
    "precision": "--calibration-precision",
}
SHORT_FLAGS = {field: f"--{flag.removeprefix('--calibration-')} {flag}" for field, flag in CALIBRATION_FLAGS.items()}


@click.command("calibrate")
@checkpoint_argument
@weights_option
@data_option
@derived_option
@settings_options(CalibrationSettings, {**SHORT_FLAGS, "fisher": "--fisher"})
@allow_stale_option
@fresh_option
@dollars_option
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    data_dir: Path | None,
    allow_stale: str | None,
    fresh: bool,
    dollars_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run text through CHECKPOINT and keep Σxxᵀ, Σ|x| and max|x| of every quantizable matrix's input.

    \b
    pgolf-post calibrate --tokens 65536
    pgolf-post calibrate --fisher                 # also Σδ² per output row, Σ s·xxᵀ, the embedding's two sides
    pgolf-post calibrate --source self --temperature 0.8
    torchrun --standalone --nproc_per_node=8 -m pgolf_post calibrate

    A second call with the same weights, text and settings reads the cache. An interrupted call resumes when it is run
    again. Any number of processes gives the same sums under the same key. Text is drawn from the training split,
    written by the model itself, or random: calibrating on validation text is against the challenge's rules and refused.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.calibrate import calibrate, report, stale_stats
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    settings = given_settings(CalibrationSettings, options, "calibrate")
    ranks = Ranks.join()
    try:
        subject = find_checkpoint(checkpoint)
        data = find_data(subject, data_dir)
        view = load_view(subject, weights)
        if allow_stale:
            stats = stale_stats(view, data, allow_stale, settings)
        else:
            stats = calibrate(view, data, settings, fresh, ranks)
        if ranks.is_main:
            print_table(report.title(stats), report.HEADER, report.rows(stats))
            seconds = round(time.perf_counter() - started, 3)
            record(stats_folder(view, stats), dollars_per_hour=dollars_per_hour, seconds=seconds)
            if as_json:
                print_json(report.answer(stats, view.id, settings, seconds))
    finally:
        ranks.leave()

"""`pgolf-post calibrate`: collect statistics once, reuse them for every later experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.calibrate.settings import CalibrationSettings
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

if TYPE_CHECKING:
    from pgolf_post.calibrate import Stats

CALIBRATION_FLAGS = {  # of commands that calibrate on the way
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
@settings_options(CalibrationSettings, {**SHORT_FLAGS, "fisher": "--fisher"})
@allow_stale_option
@fresh_option
@dollars_option
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
    pgolf-post calibrate --fisher                 # and Σδ² per output row, Σ s·xxᵀ, the embedding's two sides
    pgolf-post calibrate --source self --temperature 0.8
    torchrun --standalone --nproc_per_node=8 -m pgolf_post calibrate

    A second call with the same weights, text and settings reads the cache; an interrupted one is taken up where it
    was; any number of processes gives the same sums under the same key. Text is drawn from the training split, written
    by the model itself, or random: calibrating on validation text is against the challenge's rules, and refused.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.calibrate import calibrate, stale_stats
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    settings = given_settings(CalibrationSettings, options, "calibrate")
    ranks = Ranks.join()
    try:
        found = find_checkpoint(checkpoint)
        data = find_data(found, data_dir)
        view = load_view(found, weights)
        if allow_stale:
            stats = stale_stats(view, data, allow_stale, settings)
        else:
            stats = calibrate(view, data, settings, fresh, ranks)
        if ranks.is_main:
            _show(stats)
            seconds = round(time.perf_counter() - started, 3)
            record(stats_folder(view, stats), dollars_per_hour=dollars_per_hour, seconds=seconds)
            if as_json:
                print_json(_answer(stats, view.id, settings, seconds))
    finally:
        ranks.leave()


def _show(stats: Stats) -> None:
    rows = []
    for site, hessian in stats.hessians.items():
        diagonal = hessian.diagonal() / stats.num_tokens
        traces = stats.pass_traces[site] / stats.num_tokens
        shares = " + ".join(f"{share:.0%}" for share in (traces / traces.sum()).tolist()) if len(traces) > 1 else ""
        ratio = float(diagonal.max() / diagonal.mean()) if diagonal.any() else 0.0
        dead = int((diagonal <= 0).sum())
        values = (f"{float(traces.sum()):.4g}", f"{float(diagonal.mean()):.4g}", f"{ratio:.1f}", str(dead), shares)
        rows.append((site, str(len(diagonal)), *values))
    how = "cached; collected" if stats.cached else "collected"
    half = ", with the backward half" if stats.fisher else ""
    title = f"{how} in {stats.seconds:.1f} s: {len(rows)} sites over {stats.num_tokens:,} tokens{half}"
    header = (
        "site",
        "width",
        "trace / token",
        "mean diagonal",
        "largest / mean",
        "dead columns",
        "share of each visit",
    )
    print_table(title, header, rows)


def _answer(stats: Stats, view_id: str, settings: CalibrationSettings, seconds: float) -> dict[str, Any]:
    """The JSON answer. `traces` are per token."""
    return {
        "checkpoint_id": view_id,
        "stats_id": stats.id,
        "sites": len(stats.hessians),
        "tokens": stats.num_tokens,
        "cached": stats.cached,
        "fisher": stats.fisher is not None,
        "stale": stats.stale,
        "traces": {site: float(traces.sum()) / stats.num_tokens for site, traces in stats.pass_traces.items()},
        "settings": settings.model_dump(mode="json"),
        "collect_seconds": stats.seconds,
        "seconds": seconds,
    }

"""`pgolf-post calibrate`: collect Hessians once, reuse them for every later experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.calibrate import CalibrationSettings
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
from pgolf_post.progress import print_json, print_table

CALIBRATION_FLAGS = {"tokens": "--calibration-tokens", "seed": "--calibration-seed", "seq_len": "--calibration-seq-len"}


@click.command("calibrate")
@checkpoint_argument
@weights_option
@data_option
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@fresh_option
@json_option
def command(
    checkpoint: Path | None, weights: str | None, data_dir: Path | None, fresh: bool, as_json: bool, **options: Any
) -> None:
    """Run training text through CHECKPOINT and keep Σxxᵀ of every quantizable matrix's input.

    A second call with the same weights and text reads the cache. Text comes from the training split only: calibrating
    on validation text is against the challenge's rules.
    """
    from pgolf_post.calibrate import calibrate

    started = time.perf_counter()
    found = find_checkpoint(checkpoint)
    data = find_data(found, data_dir)
    settings = given_settings(CalibrationSettings, options, "calibrate")
    stats = calibrate(load_view(found, weights), data, settings, fresh)
    seconds = round(time.perf_counter() - started, 3)
    rows = [
        (site, str(len(h)), f"{float(h.diagonal().mean()) / stats.num_tokens:.4g}", f"{int((h.diagonal() <= 0).sum())}")
        for site, h in stats.hessians.items()
    ]
    title = f"{'cached' if stats.cached else 'collected'}: {len(rows)} Hessians over {stats.num_tokens:,} tokens"
    print_table(title, ("site", "width", "mean diagonal", "dead columns"), rows)
    if as_json:
        answer = {"stats_id": stats.id, "sites": len(rows), "tokens": stats.num_tokens, "cached": stats.cached}
        print_json({"checkpoint_id": found.view_id(weights), **answer, "seconds": seconds})  # type: ignore[arg-type]

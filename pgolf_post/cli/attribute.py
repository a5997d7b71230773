"""`pgolf-post attribute`: which tensors lose the most by being quantized, and what they save in bytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.cli.calibrate import CALIBRATION_FLAGS
from pgolf_post.cli.common import (
    allow_stale_option,
    checkpoint_argument,
    data_option,
    derived_option,
    find_checkpoint,
    find_data,
    fresh_option,
    given_settings,
    json_option,
    load_view,
    quiet_option,
    settings_options,
    threads_option,
    weights_option,
)
from pgolf_post.cli.packing import codec_option
from pgolf_post.cli.plan_options import chosen_plan, plan_options


@click.command("attribute")
@checkpoint_argument
@weights_option
@plan_options
@click.option(
    "--by",
    type=click.Choice(["role", "layer", "tensor"]),
    default="role",
    show_default=True,
    help="Group tensors by role, by layer, or not at all.",
)
@click.option(
    "--tokens",
    "score_tokens",
    type=click.IntRange(min=2),
    help="Score only this many validation tokens.",
)
@click.option(
    "--expected", is_flag=True, help="Average gains over the unquantized model's predictions: far less noise."
)
@codec_option
@data_option
@derived_option
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@allow_stale_option
@fresh_option
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    by: Any,
    score_tokens: int | None,
    expected: bool,
    codec: str,
    data_dir: Path | None,
    allow_stale: str | None,
    fresh: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize CHECKPOINT by a plan, then leave one group of tensors at a time in float and score it again.

    \b
    pgolf-post attribute --plan record-1855 --tokens 262145
    pgolf-post attribute --by layer --clip 11.5
    pgolf-post attribute --by tensor --expected --tokens 32769

    "bpb gained" is the quantized model's bpb less that with the group in float; its interval is paired by document.
    With --expected it is averaged over the unquantized model's predicted distribution instead of the actual next
    tokens, which removes most sampling noise. "bytes" are the artifact's less those of the artifact without the group.
    Ctrl-C keeps the rows that are done; the same command goes on from there.
    """
    from pgolf_post.artifacts import plan_calibration, plan_text
    from pgolf_post.attribute.report import HEADER, attribution_rows, attribution_title
    from pgolf_post.attribute.stage import attribute
    from pgolf_post.calibrate import calibrate, stale_stats
    from pgolf_post.families import train_seq_len
    from pgolf_post.score.plain import PlainProtocol

    started = time.perf_counter()
    calibration = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "attribute")
    plan = chosen_plan(**options)
    calibration = plan_calibration(calibration, plan)
    source = find_checkpoint(checkpoint)
    view = load_view(source, weights)
    data = find_data(source, data_dir)
    stats = stale_stats(view, data, allow_stale, calibration) if allow_stale else calibrate(view, data, calibration)
    protocol = PlainProtocol(seq_len=train_seq_len(view.config), max_tokens=score_tokens)
    result = attribute(
        view, stats, plan, data, protocol, by, codec, fresh, plan_text(view, data, plan, calibration), expected
    )
    print_table(attribution_title(result), HEADER, attribution_rows(result))
    if as_json:
        named = {
            "plan": plan.name,
            "settings": plan.identity(),
            "by": by,
            "expected": expected,
            "checkpoint_id": view.id,
        }
        seconds = round(time.perf_counter() - started, 3)
        where = {"attribution": str(result.folder), "stats_id": stats.id, "stale": stats.stale}
        rows = {"rows": list(result.rows), "cached": result.cached, "seconds": seconds}
        print_json({**dict(result.control), **named, **where, **rows})

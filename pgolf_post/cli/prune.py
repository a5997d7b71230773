"""`pgolf-post prune`: zero the weights that matter least, and show what that does to bytes and bpb."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.cli.calibrate import CALIBRATION_FLAGS
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    derived_option,
    find_checkpoint,
    find_data,
    given_settings,
    json_option,
    load_view,
    quiet_option,
    settings_options,
    threads_option,
    weights_option,
)
from pgolf_post.cli.plan_options import chosen_plan, plan_options


@click.command("prune")
@checkpoint_argument
@weights_option
@click.option(
    "--method",
    type=click.Choice(["magnitude", "wanda", "ones"]),
    default="magnitude",
    show_default=True,
    help="Which weights matter least, as told above.",
)
@click.option(
    "--share",
    type=FiniteFloat(),
    default=0.02,
    show_default=True,
    help="Share of each matrix (of its ±1 symbols for ones) that is zeroed.",
)
@click.option("--roles", default="", metavar="ROLE,ROLE", help="Prune only these roles, such as mlp_fc,mlp_proj.")
@plan_options
@data_option
@derived_option
@settings_options(CalibrationSettings, CALIBRATION_FLAGS)
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    method: str,
    share: float,
    roles: str,
    data_dir: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write CHECKPOINT with a share of its weights zeroed as a new checkpoint, requantize both, and compare.

    \b
    magnitude  the smallest weights of each matrix
    wanda      in each row, the smallest weight × root mean square of its input
    ones       of the symbols ±1 under the plan, those whose zeroing costs least by the Hessian
    """
    from pgolf_post.artifacts import plan_calibration, plan_text
    from pgolf_post.calibrate import calibrate
    from pgolf_post.ledger.recording import record
    from pgolf_post.prune import PruneSettings, compare, prune_checkpoint, show

    started = time.perf_counter()
    calibration = given_settings(CalibrationSettings, {key: options.pop(key) for key in CALIBRATION_FLAGS}, "prune")
    plan = chosen_plan(**options)
    calibration = plan_calibration(calibration, plan)
    wanted = tuple(role.strip() for role in roles.split(",") if role.strip())
    settings = given_settings(PruneSettings, {"method": method, "share": share, "roles": wanted}, "prune")
    home = find_checkpoint(checkpoint)
    data = find_data(home, data_dir)
    view = load_view(home, weights)
    stats, text = calibrate(view, data, calibration), plan_text(view, data, plan, calibration)
    pruned, cached = prune_checkpoint(view, stats, settings, plan, data, text)
    rows = compare({"before": view, "pruned": pruned.load("raw")}, calibration, plan, data)
    show(pruned, rows, plan)
    seconds = round(time.perf_counter() - started, 3)
    record(pruned.path, seconds=seconds)
    if as_json:
        answer = {"checkpoint": str(pruned.path), "checkpoint_id": pruned.meta["id"], "zeroed": pruned.meta["zeroed"]}
        print_json({**answer, "cached": cached, "no_op": pruned.meta["no_op"], "rows": rows, "seconds": seconds})

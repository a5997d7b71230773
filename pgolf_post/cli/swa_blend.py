"""`pgolf-post swa-blend`: average a run's warm-down checkpoints into a new checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pgolf_post.cli.common import checkpoint_argument, data_option, find_checkpoint, find_data, json_option
from pgolf_post.progress import print_json, print_table, say


@click.command("swa-blend")
@checkpoint_argument
@click.option(
    "--ema-share",
    type=float,
    default=0.0,
    show_default=True,
    help="Interpolate with the final EMA: 0 = uniform average of the warm-down's raw weights, 1 = the EMA.",
)
@data_option
@json_option
def command(checkpoint: Path | None, ema_share: float, data_dir: Path | None, as_json: bool) -> None:
    """Average the raw weights that CHECKPOINT's run saved from warm-down start to its end.

    The result is a checkpoint folder beside the run's own, with its parents and their shares recorded, and its bpb
    measured as the run's checkpoints were.
    """
    from pgolf_post.blend import swa_blend

    started = time.perf_counter()
    final = find_checkpoint(checkpoint)
    blended, cached = swa_blend(final, ema_share, find_data(final, data_dir))
    parents = blended.meta["parents"]
    rows = [(parent["folder"], parent["view"], f"{parent['share']:.4f}", parent["id"][:12]) for parent in parents]
    print_table(f"{blended.path}", ("parent", "weights", "share", "id"), rows)
    metric = blended.meta["views"]["raw"]["metric"]
    references = {name: view["metric"]["bpb"] for name, view in final.meta["views"].items() if view["metric"]}
    compared = ", ".join(f"final {name} {bpb:.5f}" for name, bpb in references.items())
    say(f"bpb {metric['bpb']:.5f} on {metric['tokens']:,} validation tokens ({compared})")
    say(f"next: pgolf-post requant {blended.path}")
    if as_json:
        sums = {key: metric[key] for key in ("bpb", "nats", "tokens", "bytes")}
        answer = {"checkpoint": str(blended.path), "checkpoint_id": blended.meta["id"], **sums, "cached": cached}
        seconds = round(time.perf_counter() - started, 3)
        print_json({**answer, "no_op": blended.meta["no_op"], "ema_share": ema_share, "seconds": seconds})

"""`pgolf-post checkpoint verify|list`: is it what it says, and which ones are there."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.cli.common import checkpoint_argument, data_option, find_checkpoint, find_data, json_option
from pgolf_post.errors import VerificationError


@click.group("checkpoint")
def command() -> None:
    """Checkpoint folders: verify one, list all."""


@command.command()
@checkpoint_argument
@data_option
@json_option
def verify(checkpoint: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Check CHECKPOINT's tensors against their ids and recompute the metric it records, to 1e-5 nats per token.

    Exit code 4 if a number does not come out again.
    """
    from pgolf_post.score.metric import TOLERANCE_NATS, verify_metric

    started = time.perf_counter()
    found = find_checkpoint(checkpoint)
    data = find_data(found, data_dir)
    results = [verify_metric(found.load(name), data) for name in found.meta["views"]]
    rows = [
        (
            r.view,
            f"{r.recorded_bpb:.7f}",
            f"{r.recomputed_bpb:.7f}",
            f"{r.difference_nats:+.1e}",
            "ok" if r.passed else "FAILED",
        )
        for r in results
    ]
    print_table(
        f"{found.path}: tensors match their ids", ("weights", "recorded bpb", "found bpb", "Δ nats/token", ""), rows
    )
    passed = all(result.passed for result in results)
    if as_json:
        views = {r.view: {"recorded": r.recorded_bpb, "bpb": r.recomputed_bpb, "passed": r.passed} for r in results}
        seconds = round(time.perf_counter() - started, 3)
        print_json({"checkpoint": str(found.path), "passed": passed, "views": views, "seconds": seconds})
    if not passed:
        raise VerificationError(
            f"{found.path}: a recorded metric differs by more than {TOLERANCE_NATS:g} nats per token"
        )


@command.command("list")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("checkpoints"),
    show_default=True,
    help="The folder that holds the runs.",
)
@json_option
def list_command(root: Path, as_json: bool) -> None:
    """Every complete checkpoint under --root, oldest first."""
    from pgolf_post.checkpoint import list_checkpoints

    found = list_checkpoints(root)
    rows = []
    for checkpoint in found:
        meta = checkpoint.meta
        metrics = {name: view["metric"]["bpb"] for name, view in meta["views"].items() if view.get("metric")}
        bpb = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        rows.append((str(checkpoint.path), meta["kind"], f"{meta['step']}", bpb, meta["id"][:12]))
    print_table(f"{len(rows)} checkpoints under {root}", ("folder", "kind", "step", "bpb", "id"), rows)
    if as_json:
        listed = [{"path": str(c.path), "checkpoint_id": c.meta["id"], "kind": c.meta["kind"]} for c in found]
        print_json({"checkpoints": listed})

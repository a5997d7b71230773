"""`pgolf-post checkpoint verify|list`: whether a checkpoint is what it says, and which ones there are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    find_checkpoint,
    find_data,
    json_option,
    quiet_option,
    threads_option,
)
from pgolf_post.errors import VerificationError

if TYPE_CHECKING:
    from pgolf_post.score.metric import Verification


@click.group("checkpoint")
def command() -> None:
    """Checkpoint folders: verify one, list all."""


@command.command("verify")
@checkpoint_argument
@data_option
@threads_option
@quiet_option
@json_option
def verify_command(checkpoint: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Check CHECKPOINT's tensors against their ids and recompute the metric it records, to 1e-5 nats per token.

    Exit code 4 if a recorded number cannot be reproduced.
    """
    from pgolf_post.score.metric import TOLERANCE_NATS, verify_metric

    started = time.perf_counter()
    subject = find_checkpoint(checkpoint)
    data = find_data(subject, data_dir)
    checks = [verify_metric(subject.load(name), data) for name in subject.meta["views"]]
    header = ("weights", "recorded bpb", "measured bpb", "Δ nats/token", "")
    print_table(f"{subject.path}: tensors match their ids", header, [_cells(check) for check in checks])
    passed = all(check.passed for check in checks)
    if as_json:
        views = {c.view: {"recorded": c.recorded_bpb, "bpb": c.recomputed_bpb, "passed": c.passed} for c in checks}
        seconds = round(time.perf_counter() - started, 3)
        print_json({"checkpoint": str(subject.path), "passed": passed, "views": views, "seconds": seconds})
    if not passed:
        raise VerificationError(
            f"{subject.path}: a recorded metric differs by more than {TOLERANCE_NATS:g} nats per token"
        )


def _cells(check: Verification) -> tuple[str, ...]:
    """Return one view's row of the table."""
    numbers = (f"{check.recorded_bpb:.7f}", f"{check.recomputed_bpb:.7f}", f"{check.difference_nats:+.1e}")
    return check.view, *numbers, "ok" if check.passed else "FAILED"


@command.command("list")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("checkpoints"),
    show_default=True,
    help="Folder that holds the runs.",
)
@json_option
def list_command(root: Path, as_json: bool) -> None:
    """List every complete checkpoint under --root, oldest first."""
    from pgolf_post.checkpoint import list_checkpoints
    from pgolf_post.describe import CHECKPOINT_HEADER, checkpoint_row

    checkpoints = list_checkpoints(root)
    title = f"{len(checkpoints)} checkpoints under {root}"
    print_table(title, CHECKPOINT_HEADER, [checkpoint_row(checkpoint) for checkpoint in checkpoints])
    if as_json:
        listed = [{"path": str(c.path), "checkpoint_id": c.meta["id"], "kind": c.meta["kind"]} for c in checkpoints]
        print_json({"checkpoints": listed})

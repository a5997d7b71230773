"""Retention of a run's checkpoints: phase boundaries always, periodic ones as long as they are among the newest.

A periodic checkpoint (phase "periodic") exists to be resumed from; `checkpoint.keep_last` says how many stay. None goes
while it is useful otherwise: what `latest` points at, what has results under derived/, what another checkpoint names as
its parent. `checkpoint.keep_optimizer_state = "last"` drops the optimizer state, two thirds of a folder, from all but
the newest; such a folder can be averaged, quantized and scored, not resumed. Whatever goes is said.
"""

from __future__ import annotations

from pathlib import Path

from pgolf_post.base.progress import say
from pgolf_post.base.storage import remove_folder
from pgolf_post.checkpoint import TRAINING_FILE, Checkpoint, list_checkpoints
from pgolf_post.errors import PgolfError
from trainer.config import CheckpointSettings
from trainer.run.phases import PERIODIC


def apply_retention(root: Path, run: Path, settings: CheckpointSettings) -> None:
    """Delete what the settings let go of in one run. Raises PgolfError if the disk refuses."""
    if settings.keep_last is None and settings.keep_optimizer_state == "all":
        return
    ours = checkpoints_of(root, run)
    try:
        if settings.keep_last is not None:
            _drop_periodic(root, ours, settings.keep_last)
        if settings.keep_optimizer_state == "last":
            _drop_optimizer_state(root, ours[:-1])
    except OSError as error:
        raise PgolfError(f"could not delete an older checkpoint of {run}: {error}") from error


def checkpoints_of(root: Path, run: Path) -> list[Checkpoint]:
    """Return the complete training checkpoints of one run under `root`, in step order."""
    ours = [c for c in list_checkpoints(root) if c.path.parent == run and c.meta["kind"] == "raw"]
    return sorted(ours, key=lambda checkpoint: int(checkpoint.meta["step"]))


def _drop_periodic(root: Path, ours: list[Checkpoint], keep_last: int) -> None:
    parents = {_parent_id(parent) for c in list_checkpoints(root) for parent in c.meta.get("parents", [])}
    for checkpoint in [c for c in ours if c.meta["phase"] == PERIODIC][:-keep_last]:
        if not _is_needed(root, checkpoint, parents):
            remove_folder(checkpoint.path)
            say(f"deleted {checkpoint.path}: checkpoint.keep_last {keep_last}")


def _is_needed(root: Path, checkpoint: Checkpoint, parents: set[str]) -> bool:
    """Return whether something points at this checkpoint or was made from it."""
    ids = {str(view["id"]) for view in checkpoint.meta["views"].values()}
    has_results = any((checkpoint.path / "derived").glob("*"))
    return has_results or bool(ids & parents) or _is_latest(root, checkpoint)


def _drop_optimizer_state(root: Path, older: list[Checkpoint]) -> None:
    for checkpoint in older:
        state = checkpoint.path / TRAINING_FILE
        if state.is_file() and not _is_latest(root, checkpoint):
            state.unlink()
            say(f'deleted {state}: checkpoint.keep_optimizer_state "last"')


def _is_latest(root: Path, checkpoint: Checkpoint) -> bool:
    return (root / "latest").resolve() == checkpoint.path.resolve()


def _parent_id(parent: object) -> str:
    """Return a parent's id; in a blend the parent is a record that has one."""
    return str(parent["id"] if isinstance(parent, dict) else parent)

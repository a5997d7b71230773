"""Disk space that a run will need, known before it starts: checkpoints that stay and snapshots of averages."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pgolf_post.data import DataFolder
from pgolf_post.families import on_no_device
from trainer.config import Recipe
from trainer.model.architecture import GraphState
from trainer.model.gpt import GolfGPT
from trainer.optim.optimizer import num_moments
from trainer.plan.preflight import Finding
from trainer.plan.timeline import Timeline
from trainer.step.future_heads import with_heads

FLOAT_BYTES = 4


@dataclass(frozen=True)
class DiskNeed:
    """Bytes on disk, at most."""

    checkpoints: int
    snapshots: int  # of power-function averages

    def __str__(self) -> str:
        line = f"{_human(self.checkpoints)} of checkpoints"
        return f"{line}, {_human(self.snapshots)} of snapshots for post-hoc EMA" if self.snapshots else line


def disk_need(timeline: Timeline) -> DiskNeed | None:
    """Return the disk space of a run; None where the data folder is not here, which decides the vocabulary."""
    recipe = timeline.recipe
    if not recipe.data.dir.is_dir():
        return None
    with on_no_device():
        model = GolfGPT(recipe.model_config_in(DataFolder.open(recipe.data.dir)), GraphState())
    trained = with_heads(recipe, model)
    weights, with_later = (
        FLOAT_BYTES * sum(parameter.numel() for parameter in module.parameters()) for module in (model, trained)
    )
    heads, num_tracks = with_later - weights, len(recipe.optim.power_ema_sigmas)
    training = FLOAT_BYTES * num_moments(trained, recipe.optim) + heads + num_tracks * weights  # training.safetensors
    return DiskNeed(
        _num_kept(timeline) * _num_views(recipe) * weights + _num_resumable(timeline) * training,
        num_tracks * (recipe.optim.power_ema_snapshots + timeline.num_checkpoints) * weights,
    )


def free_bytes(recipe: Recipe) -> int:
    """Return the bytes that this user may still write where the run's checkpoints go."""
    place = recipe.run.checkpoint_root.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_free(need: DiskNeed, free: int, root: Path) -> Finding | None:
    """Refuse a run that needs more disk space than there is."""
    total = need.checkpoints + need.snapshots
    if total <= free:
        return None
    return Finding(
        "refuse",
        "run.checkpoint_root",
        f"run.checkpoint_root {root}: {_human(free)} free, the run writes up to {_human(total)}; free space, choose "
        'another place, or keep less: checkpoint.keep_last, checkpoint.keep_optimizer_state = "last"',
    )


def _num_kept(timeline: Timeline) -> int:
    keep_last = timeline.recipe.checkpoint.keep_last
    periodic = timeline.num_periodic if keep_last is None else min(keep_last, timeline.num_periodic)
    return timeline.num_checkpoints + periodic


def _num_resumable(timeline: Timeline) -> int:
    """Return how many folders hold optimizer state in the end."""
    settings = timeline.recipe.checkpoint
    if not settings.optimizer_state:
        return 0
    return 1 if settings.keep_optimizer_state == "last" else _num_kept(timeline)


def _num_views(recipe: Recipe) -> int:
    return 1 + bool(recipe.optim.ema_decay) + (recipe.optim.swa_start is not None)


def _human(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

"""Weight averaging after training: linear blends of a run's checkpoints, as new checkpoints.

SWA (Izmailov et al. 2018, arXiv 1803.05407) averages raw weights along the warm-down; the EMA is the trainer's own
running average. `ema_share` interpolates between the two: 0 is pure SWA, 1 the EMA itself. Sums are float64, results
float32. Checkpoints whose configs differ, runtime graph state included, are not averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf_post.checkpoint import (
    Checkpoint,
    View,
    require_same_config,
    run_checkpoints,
    save_checkpoint,
    view_id,
)
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError
from pgolf_post.progress import progress_bar, say
from pgolf_post.score.metric import measure


@dataclass(frozen=True)
class Part:
    """One ingredient of a blend."""

    view: View
    share: float


def linear_blend(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Σ share · tensor over the parts, float32. Shares must sum to 1. Inputs are untouched.

    Raises SettingsError on shares that do not sum to 1, MismatchError on differing configs.
    """
    total = sum(part.share for part in parts)
    if abs(total - 1) > 1e-9:
        raise SettingsError(f"blend shares sum to {total:.6g}, must sum to 1")
    require_same_config([part.view.checkpoint for part in parts])
    blended = {}
    for name in parts[0].view.tensors:
        accumulated = torch.zeros(parts[0].view.tensors[name].shape, dtype=torch.float64)
        for part in parts:
            accumulated += part.share * part.view.tensors[name].double()
        blended[name] = accumulated.float()
    return blended


def warmdown_members(final: Checkpoint) -> list[Checkpoint]:
    """The run's checkpoints from warm-down start on, the final one included. Raises NotFoundError if it is alone."""
    recipe = final.meta.get("recipe", {})
    start = 1.0 - float(recipe.get("schedule", {}).get("warmdown", 0.0))
    members = [c for c in run_checkpoints(final) if float(c.meta.get("progress", 0.0)) >= start - 1e-9]
    if len(members) < 2:
        raise NotFoundError(
            f"{final.path.parent} has {len(members)} checkpoint(s) from its warm-down "
            f"(progress ≥ {start:.2f}); SWA needs 2",
            hint='train with checkpoint.phases including "warmdown_start", or checkpoint.fractions = [0.7, 0.85]',
        )
    return members


def swa_parts(final: Checkpoint, ema_share: float) -> list[Part]:
    """Uniform SWA of the warm-down's raw weights, interpolated with the final EMA by `ema_share` in [0, 1]."""
    if not 0 <= ema_share <= 1:
        raise SettingsError(f"--ema-share {ema_share} is outside 0..1")
    parts = []
    if ema_share < 1:
        members = warmdown_members(final)
        require_same_config(members)
        with progress_bar("reading checkpoints", len(members)) as advance:
            for member in members:
                parts.append(Part(member.load("raw"), (1 - ema_share) / len(members)))
                advance(note=member.path.name)
    if ema_share > 0:
        parts.append(Part(final.load("ema"), ema_share))
    return parts


def swa_blend(final: Checkpoint, ema_share: float, data: DataFolder) -> tuple[Checkpoint, bool]:
    """The blended checkpoint beside its run, and whether it was there already.

    The folder's name starts with its content id, so the same blend is found again and another never overwrites it.
    """
    if final.meta.get("kind") != "raw":
        raise MismatchError(
            f"{final.path} is a {final.meta.get('kind')!r} checkpoint; SWA starts from a training run's"
        )
    parts = swa_parts(final, ema_share)
    tensors = linear_blend(parts)
    blend_id = view_id(tensors, final.config)
    path = final.path.parent / f"swa_{blend_id[:12]}"
    if (path / "meta.json").is_file():
        say(f"{path}: cached")
        return Checkpoint.open(path), True
    no_op = any(blend_id == part.view.id for part in parts)
    if no_op:
        say("NO-OP: the blend equals one of its parents")
    meta = {**_blend_meta(final, parts), "ema_share": ema_share, "no_op": no_op}
    metric = measure(final, tensors, data)
    return save_checkpoint(path, final.config, {"raw": tensors}, meta, {"raw": metric}), False


def _blend_meta(final: Checkpoint, parts: Sequence[Part]) -> dict[str, Any]:
    parents = [
        {"id": part.view.id, "view": part.view.name, "folder": part.view.checkpoint.path.name, "share": part.share}
        for part in parts
    ]
    inherited = {key: final.meta[key] for key in ("run", "step", "tokens_seen", "train_seconds", "data_dir", "recipe")}
    return {"kind": "swa", "phase": "blend", "parents": parents, **inherited}

"""Pruned checkpoints: a view with a share of its weights zeroed, as a new checkpoint folder beside its parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pgolf_post.artifacts import plan_text, requant
from pgolf_post.base.progress import print_table, say
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import Checkpoint, View, save_checkpoint, view_id
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.plan import Plan
from pgolf_post.quantize.masks import PruneMethod, magnitude_mask, ones_mask, wanda_mask
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import scale_of
from pgolf_post.score.cached import score_artifact, score_view
from pgolf_post.score.metric import measure, recorded_protocol
from pgolf_post.settings import Settings


class PruneSettings(Settings):
    """Settings of pruning: which weights are zeroed."""

    method: PruneMethod = Field("magnitude", description="Which weights matter least.")
    share: float = Field(0.02, gt=0, le=1, description="Share of each matrix (of its ±1 symbols for ones) set to zero.")
    roles: tuple[str, ...] = Field((), description="Roles that are pruned; empty prunes every matrix with a Hessian.")


def prune_view(
    view: View, stats: Stats, settings: PruneSettings, plan: Plan, text: CalibrationSet | None = None
) -> tuple[dict[str, Tensor], int, int]:
    """Return tensors, weights newly zeroed, weights looked at. `plan` and `text` (see requant) give the grid of *ones*.

    Raises SettingsError if a role names no matrix that has a Hessian.
    """
    family = view.family
    site_of = {name: site.name for site in family.sites(view.module) for name in site.tensors}
    chosen = [name for name in site_of if not settings.roles or family.role(name) in settings.roles]
    if not chosen:
        known = ", ".join(sorted({family.role(name) for name in site_of}))
        raise SettingsError(f"--roles {','.join(settings.roles)}: no such matrices; roles with a Hessian: {known}")
    masks = _masks(view, stats, settings, plan, {name: site_of[name] for name in chosen}, text)
    tensors = dict(view.tensors)
    zeroed = 0
    for name, mask in masks.items():
        zeroed += int((mask & (tensors[name] != 0)).sum())
        tensors[name] = tensors[name].masked_fill(mask, 0)
    return tensors, zeroed, sum(mask.numel() for mask in masks.values())


def _masks(
    view: View,
    stats: Stats,
    settings: PruneSettings,
    plan: Plan,
    site_of: Mapping[str, str],
    text: CalibrationSet | None,
) -> dict[str, Tensor]:  # name → (out, in) bool
    """Return which weights of each matrix go."""
    if settings.method == "magnitude":
        return {name: magnitude_mask(view.tensors[name], settings.share) for name in site_of}
    if settings.method == "wanda":
        squares = {name: stats.mean_hessian(site).diagonal() for name, site in site_of.items()}
        return {name: wanda_mask(view.tensors[name], square, settings.share) for name, square in squares.items()}
    quantized = quantize_view(view, stats, plan, text=text).quantized
    masks = {}
    for name, site in site_of.items():
        tensor = quantized[name]
        error = view.tensors[name].float() - torch.from_numpy(tensor.dequantize())
        steps = torch.from_numpy(scale_of(tensor.factors, *tensor.symbols.shape))
        masks[name] = ones_mask(
            torch.from_numpy(tensor.symbols), steps, error, stats.mean_hessian(site), settings.share
        )
    return masks


def prune_checkpoint(
    view: View,
    stats: Stats,
    settings: PruneSettings,
    plan: Plan,
    data: DataFolder,
    text: CalibrationSet | None = None,
) -> tuple[Checkpoint, bool]:
    """Return the pruned checkpoint, and whether it was there already: its folder is named by its content."""
    tensors, zeroed, weights = prune_view(view, stats, settings, plan, text)
    pruned_id = view_id(tensors, view.config)
    path = view.checkpoint.path.parent / f"pruned_{pruned_id[:12]}"
    if (path / "meta.json").is_file():
        say(f"{path}: cached")
        return Checkpoint.open(path), True
    if zeroed == 0:
        say("NO-OP: every weight that would be zeroed is zero already")
    meta = {**_meta(view, settings), "zeroed": zeroed, "weights": weights, "no_op": zeroed == 0}
    metric = measure(view.checkpoint, tensors, data)
    return save_checkpoint(path, view.config, {"raw": tensors}, meta, {"raw": metric}), False


def _meta(view: View, settings: PruneSettings) -> dict[str, Any]:
    kept = ("run", "step", "tokens_seen", "train_seconds", "data_dir", "recipe")
    inherited = {key: view.checkpoint.meta[key] for key in kept if key in view.checkpoint.meta}
    parent = {"id": view.id, "view": view.name, "folder": view.checkpoint.path.name}
    return {
        "kind": "pruned",
        "phase": "prune",
        "parents": [parent],
        "prune": settings.model_dump(mode="json"),
        **inherited,
    }


def compare(
    views: Mapping[str, View], calibration: CalibrationSettings, plan: Plan, data: DataFolder
) -> dict[str, dict[str, Any]]:  # name → bpb, quantized_bpb, artifact_bytes
    """Quantize views by a plan; return the bpb of each before and after, and its artifact's bytes."""
    return {name: _measured(view, calibration, plan, data) for name, view in views.items()}


def _measured(view: View, calibration: CalibrationSettings, plan: Plan, data: DataFolder) -> dict[str, Any]:
    _, protocol = recorded_protocol(view.checkpoint, view.name)
    text = plan_text(view, data, plan, calibration)
    artifact = requant(view, calibrate(view, data, calibration), plan, text=text)
    quantized, _ = score_artifact(artifact.path, data, protocol, decoded=artifact.verified)
    score, _ = score_view(view, data, protocol)
    size = artifact.path.stat().st_size
    return {"bpb": score["bpb"], "quantized_bpb": quantized["bpb"], "artifact_bytes": size}


def show(pruned: Checkpoint, rows: Mapping[str, Mapping[str, Any]], plan: Plan) -> None:
    """Print a pruned checkpoint beside its parent."""
    cells = [
        (name, f"{row['bpb']:.5f}", f"{row['quantized_bpb']:.5f}", f"{row['artifact_bytes']:,}")
        for name, row in rows.items()
    ]
    print_table(f"{pruned.path}", ("", "bpb", "bpb quantized", "artifact bytes"), cells)
    say(f"{pruned.meta['zeroed']:,} of {pruned.meta['weights']:,} weights zeroed; bytes by plan {plan.name}")
    say(f"next: pgolf-post requant {pruned.path}")

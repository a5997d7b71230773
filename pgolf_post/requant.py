"""Requant: a checkpoint view and its statistics → an artifact on disk, read back before anyone hears of it.

The written file is decoded by the decoder that ships and its symbols are hashed again; they must be those that were
packed. The same view, statistics, plan and codec find the same folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.errors import VerificationError
from pgolf_post.pack.artifact import ARTIFACT_FILE, read_artifact, write_artifact
from pgolf_post.pack.container import PackSettings, count_units, pack
from pgolf_post.plan import Plan
from pgolf_post.progress import progress_bar
from pgolf_post.quantize.factors import StatsFactors
from pgolf_post.quantize.run import quantize_view
from pgolf_post.quantize.tensor import symbols_sha256
from pgolf_post.settings import parse_settings

STAGE, STAGE_VERSION, PAYLOAD = "artifact", 2, ARTIFACT_FILE


@dataclass(frozen=True)
class Artifact:
    """A packed model on disk."""

    folder: Path
    id: str
    meta: Mapping[str, Any]  # symbols_sha256, tensors: [facts], seconds
    cached: bool

    @property
    def path(self) -> Path:
        return self.folder / PAYLOAD

    @property
    def symbols_sha256(self) -> str:
        return str(self.meta["symbols_sha256"])


def requant(
    view: View,
    stats: Stats,
    plan: Plan,
    codec: str = "rans",
    fresh: bool = False,
    factors: StatsFactors | None = None,
) -> Artifact:
    """Quantize and pack a view; cached by view, statistics, plan and codec.

    Raises SettingsError for an unknown codec, VerificationError if decoding the written file does not give back the
    symbols that were packed.
    """
    packing = parse_settings(PackSettings, {"codec": codec}, "requant")
    identity = {**plan.identity(), "codec": codec}
    artifact_id = derived_id(STAGE, STAGE_VERSION, [view.id, stats.id], identity)
    folder = view.checkpoint.derived(STAGE, artifact_id)

    def make(building: Path) -> Mapping[str, Any]:
        model = quantize_view(view, stats, plan, factors)
        with progress_bar("packing", count_units(model)) as advance:
            write_artifact(building / PAYLOAD, pack(model, packing, advance))
        packed, decoded = model.symbols_sha256(), symbols_sha256(read_artifact(building / PAYLOAD).symbols)
        if decoded != packed:
            raise VerificationError(f"decoded symbols {decoded[:12]} are not the packed {packed[:12]}")
        rows = [{"name": name, **tensor.facts} for name, tensor in model.quantized.items()]
        stale = {"stale": dict(stats.stale)} if stats.stale else {}  # statistics of other weights, and how far off
        return {"symbols_sha256": packed, "view_id": view.id, **stale, "tensors": rows}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, "stats_id": stats.id}
    config["plan"] = plan.name
    meta, cached = load_or_make(folder, PAYLOAD, {**config, **identity}, make, fresh)
    return Artifact(folder, artifact_id, meta, cached)


def is_no_op(trial: Artifact, control: Artifact) -> bool:
    """Whether a trial is its control: the same symbols, and decoded from disk the same weights to the bit."""
    if trial.symbols_sha256 != control.symbols_sha256:
        return False
    first, second = (read_artifact(artifact.path).tensors for artifact in (trial, control))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)

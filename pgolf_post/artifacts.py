"""Requant: a checkpoint view and its statistics → an artifact on disk, read back before anyone hears of it.

The written file is decoded by the decoder that ships and its symbols are hashed again; they must be those that were
packed. The same view, statistics, plan and codec (and, where the plan reads it, calibration text) find the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.calibrate import CalibrationSettings, Stats
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.errors import SettingsError
from pgolf_post.pack.artifact import ARTIFACT_FILE, read_artifact, write_verified
from pgolf_post.pack.container import PackSettings, count_units, pack
from pgolf_post.plan import Plan
from pgolf_post.quantize.distill import DistillReport, distill
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.model import quantize_beside_floats
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.settings import parse_settings

STAGE, STAGE_VERSION, PAYLOAD = "artifact", 2, ARTIFACT_FILE


@dataclass(frozen=True)
class PackedArtifact:
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
    text: CalibrationSet | None = None,
) -> PackedArtifact:
    """Quantize and pack a view; cached by view, statistics, plan, codec and what the plan reads of `text`.

    Raises SettingsError for an unknown codec or a plan that needs a text and has none, VerificationError if decoding
    the written file does not give back the symbols that were packed.
    """
    packing = parse_settings(PackSettings, {"codec": codec}, "requant")
    identity = {**plan_identity(plan, text), "codec": codec}
    artifact_id = derived_id(STAGE, STAGE_VERSION, [view.id, stats.id], identity)
    folder = view.checkpoint.derived(STAGE, artifact_id)

    def make(building: Path) -> Mapping[str, Any]:
        model, _, report = quantize_by_plan(view, stats, plan, factors, text)
        with progress_bar("packing", count_units(model)) as advance:
            data = pack(model, packing, advance)
        facts = artifact_facts(model, view, stats, packing.codec)
        write_verified(building / PAYLOAD, data, facts["symbols_sha256"])
        return {**facts, **({"distill": report.facts()} if report else {})}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, "stats_id": stats.id}
    config["plan"] = plan.name
    meta, cached = load_or_make(folder, PAYLOAD, {**config, **identity}, make, fresh)
    return PackedArtifact(folder, artifact_id, meta, cached)


def artifact_facts(model: QuantizedModel, view: View, stats: Stats, codec: str) -> dict[str, Any]:
    """What the meta.json of an artifact says of the model in it, whoever packs it.

    Two artifacts of equal content, lineage and codec are the same file.
    """
    return {
        "symbols_sha256": model.symbols_sha256(),
        "content_sha256": model.content_sha256(),
        "lineage": json.dumps(dict(model.lineage), sort_keys=True),
        "codec": codec,
        "view_id": view.id,
        **({"stale": dict(stats.stale)} if stats.stale else {}),  # statistics of other weights, and how far off
        "tensors": [{"name": name, **tensor.facts} for name, tensor in model.quantized.items()],
    }


def plan_identity(plan: Plan, text: CalibrationSet | None) -> dict[str, Any]:
    """What a plan's result depends on beside view and statistics. Raises SettingsError if the plan lacks its text."""
    if not plan.reads_text:
        return plan.identity()
    if text is None:
        raise SettingsError(
            f"plan {plan.name!r} is sequential or distils, and this command gives it no calibration text",
            hint="use it with pgolf-post requant, attribute or prune",
        )
    return {**plan.identity(), "calibration_sha256": text.sha256}


def plan_text(view: View, data: DataFolder, plan: Plan, calibration: CalibrationSettings) -> CalibrationSet | None:
    """The calibration text, where a plan reads it beside the statistics. Raises MismatchError as `calibrate` does."""
    if not plan.reads_text:
        return None
    return calibration_text(view, data, calibration, calibration.seq_len or view.train_seq_len)


def quantize_by_plan(
    view: View, stats: Stats, plan: Plan, factors: StatsFactors | None = None, text: CalibrationSet | None = None
) -> tuple[QuantizedModel, dict[str, Tensor], DistillReport | None]:
    """All that a plan says of a model: rounded, then distilled.

    Returns the model, its tensors without loss (see `quantize_beside_floats`), and what distillation did.
    """
    model, floats = quantize_beside_floats(view, stats, plan, factors, text)
    if plan.distill is None:
        return model, floats, None
    plan_identity(plan, text)
    assert text is not None
    tuned, report = distill(model, view, text, plan.distill)
    return tuned, floats, report


def is_no_op(trial: PackedArtifact, control: PackedArtifact) -> bool:
    """Whether a trial is its control: the same symbols, and decoded from disk the same weights to the bit."""
    if trial.symbols_sha256 != control.symbols_sha256:
        return False
    first, second = (read_artifact(artifact.path).tensors for artifact in (trial, control))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)

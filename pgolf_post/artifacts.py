"""The artifact stage: quantize → pack → verify → store, for `requant`, `fit` and sweeps alike.

An `ArtifactKey` says what decides an artifact, and thereby its id and its folder. Whoever wants one first looks it up
(`find`); if it is not there, it makes the quantized model in its own way and stores it (`keep`). The written file is
decoded by the decoder that ships and its symbols are hashed again; they must be those that were packed. What was
decoded then stays at hand, so that scoring and comparing do not decode once more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.base.storage import read_json, sha256_file
from pgolf_post.calibrate import CalibrationSettings, Stats
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage, is_leftover, require_writable_result
from pgolf_post.errors import SettingsError
from pgolf_post.pack.artifact import ARTIFACT_FILE, DecodedArtifact, read_artifact, write_verified
from pgolf_post.pack.container import PackSettings, count_units, pack
from pgolf_post.plan import Plan
from pgolf_post.quantize.distill import DistillReport, distill
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.model import quantize_beside_floats
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.settings import parse_settings

ARTIFACT = Stage("artifact", 2, ARTIFACT_FILE)  # quantized by a plan
FITTED = replace(ARTIFACT, version=4)  # quantized to a byte budget


@dataclass(frozen=True)
class PackedArtifact:
    """A packed model on disk."""

    folder: Path
    id: str
    meta: Mapping[str, Any]  # symbols_sha256, tensors: [facts], seconds
    cached: bool
    verified: DecodedArtifact | None = field(
        default=None, compare=False, repr=False
    )  # decoded when the file was written

    @property
    def path(self) -> Path:
        return self.folder / ARTIFACT.payload

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    @property
    def symbols_sha256(self) -> str:
        return str(self.meta["symbols_sha256"])

    def decoded(self) -> DecodedArtifact:
        """Return what the file decodes to: as it was verified, else read now."""
        return self.verified or read_artifact(self.path)

    def forgotten(self) -> PackedArtifact:
        """Return the same artifact without its decoded tensors, which take five bytes a weight."""
        return replace(self, verified=None)


@dataclass(frozen=True)
class ArtifactKey:
    """Everything that decides an artifact, and thereby its id and folder."""

    view: View
    stats_id: str
    plan: str  # its name, for people; the plan itself is part of `identity`
    identity: Mapping[str, Any]  # settings as JSON: what quantizes, the codec
    stage: Stage = ARTIFACT

    @cached_property
    def id(self) -> str:
        return self.stage.id([self.view.id, self.stats_id], self.identity)

    @property
    def folder(self) -> Path:
        return self.view.checkpoint.derived(self.stage.name, self.id)

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json beside stage and version."""
        named = {"view": self.view.name, "view_id": self.view.id, "stats_id": self.stats_id, "plan": self.plan}
        return {**named, **self.identity}


def plan_key(
    view: View, stats_id: str, plan: Plan, codec: str, text: CalibrationSet | None = None, jitter_seed: int = 0
) -> ArtifactKey:
    """Return the key of a view quantized by a plan. Raises SettingsError if the plan lacks its text.

    `jitter_seed`, if not 0, says that rows were moved at random first (see sweep/weights.py).
    """
    jitter = {"jitter_seed": jitter_seed} if jitter_seed else {}
    return ArtifactKey(view, stats_id, plan.name, {**plan_identity(plan, text), "codec": codec, **jitter})


def find(key: ArtifactKey) -> PackedArtifact | None:
    """Return the artifact if it is there and intact, said aloud."""
    meta = key.stage.intact_meta(key.folder)
    return None if meta is None else PackedArtifact(key.folder, key.id, meta, cached=True)


def keep(
    key: ArtifactKey,
    model: QuantizedModel,
    stats: Stats,
    codec: str,
    packed: Callable[[], bytes],  # the model's file
    facts: Mapping[str, Any],  # more for meta.json
    phases: Mapping[str, float],  # seconds so far: quantize, and compress where packing was part of a search
    started: float | None = None,  # by time.perf_counter(): where `seconds` begin; None: with packing
    link_twins: bool = False,  # a file of the very same model is linked instead of packed again
) -> PackedArtifact:
    """Pack a model, verify the file, and store it under its key.

    Raises VerificationError if decoding the written file does not give back the symbols that were packed.
    """
    recorded = {**artifact_facts(model, key.view, stats, codec), **facts}
    verified: list[DecodedArtifact] = []

    def make(building: Path) -> Mapping[str, Any]:
        path = building / key.stage.payload
        twin, spent = _twin(key.folder.parent, recorded) if link_twins else None, dict(phases)
        if twin is None:
            before = time.perf_counter()
            data = packed()
            after = time.perf_counter()
            spent["compress"] = spent.get("compress", 0.0) + after - before
            verified.append(write_verified(path, data, recorded["symbols_sha256"]))
            spent["verify"] = time.perf_counter() - after
        else:
            _link(twin, path)
        seconds = {} if started is None else {"seconds": round(time.perf_counter() - started, 3)}
        by_phase = {name: round(value, 3) for name, value in spent.items()}
        return {**recorded, **seconds, "phase_seconds": by_phase}

    meta = key.stage.store(key.folder, key.config, make)
    return PackedArtifact(key.folder, key.id, meta, False, verified[0] if verified else None)


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

        >>> pg.requant(view, stats, pg.read_plan("sdclip-1394")).num_bytes

    Raises SettingsError for an unknown codec or a plan that needs a text and has none, VerificationError if decoding
    the written file does not give back the symbols that were packed.
    """
    packing = parse_settings(PackSettings, {"codec": codec}, "requant")
    key = plan_key(view, stats.id, plan, codec, text)
    artifact = None if fresh else find(key)
    if artifact is not None:
        return artifact
    require_writable_result(key.folder)
    started = time.perf_counter()
    model, _, report = quantize_by_plan(view, stats, plan, factors, text)
    quantize_seconds = time.perf_counter() - started - (report.seconds if report else 0.0)

    def packed() -> bytes:
        with progress_bar("packing", count_units(model), "units") as advance:
            return pack(model, packing, advance)

    facts = {"distill": report.facts()} if report else {}
    return keep(key, model, stats, packing.codec, packed, facts, {"quantize": quantize_seconds}, started)


def artifact_facts(model: QuantizedModel, view: View, stats: Stats, codec: str) -> dict[str, Any]:
    """Return what an artifact's meta.json says of the model in it, whoever packs it.

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
    """Return what a plan's result depends on beside view and statistics.

    Raises SettingsError if the plan reads a calibration text and has none.
    """
    if not plan.reads_text:
        return plan.identity()
    if text is None:
        raise SettingsError(
            f"plan {plan.name!r} is sequential or distils, and this command gives it no calibration text",
            hint="use it with pgolf-post requant, attribute or prune",
        )
    return {**plan.identity(), "calibration_sha256": text.sha256}


def plan_text(view: View, data: DataFolder, plan: Plan, calibration: CalibrationSettings) -> CalibrationSet | None:
    """Return the calibration text where a plan reads it, else None. Raises MismatchError as `calibrate` does."""
    if not plan.reads_text:
        return None
    return calibration_text(view, data, calibration, calibration.seq_len or view.train_seq_len)


def plan_calibration(calibration: CalibrationSettings, *plans: Plan) -> CalibrationSettings:
    """Return the calibration settings, with the backward half (fisher) where a plan reads it."""
    if any(plan.reads_fisher for plan in plans):
        return calibration.model_copy(update={"fisher": True})
    return calibration


def quantize_by_plan(
    view: View, stats: Stats, plan: Plan, factors: StatsFactors | None = None, text: CalibrationSet | None = None
) -> tuple[QuantizedModel, dict[str, Tensor], DistillReport | None]:
    """Do all that a plan says to a model: round it, then distil it.

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
    """Whether a trial is its control: the same symbols, which decode to the same weights to the bit."""
    if trial.symbols_sha256 != control.symbols_sha256:
        return False
    contents = [artifact.meta.get("content_sha256") for artifact in (trial, control)]
    if contents[0] is not None and contents[0] == contents[1]:
        return True
    # Artifacts of before content was hashed, or factors that differ and may yet mean the same.
    first, second = (artifact.decoded().tensors for artifact in (trial, control))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def _twin(stage: Path, facts: Mapping[str, Any]) -> Path | None:
    """Return the file of an artifact that was made of the very same model by the same codec, if there is one."""
    for meta_path in sorted(stage.glob("*/meta.json")):
        if is_leftover(meta_path.parent):
            continue
        meta = read_json(meta_path)
        if all(meta.get(key) == facts[key] for key in ("content_sha256", "codec", "lineage")):
            path = meta_path.parent / ARTIFACT.payload
            if path.is_file() and sha256_file(path) == meta["payload_sha256"]:
                return path
    return None


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        destination.write_bytes(source.read_bytes())

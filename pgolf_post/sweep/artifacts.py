"""A trial's artifact: found where `requant` would have put it, or quantized and packed there.

Symbols that another trial packed already are not packed again (the artifact is a link to its file). A file that was
packed is read back by the decoder that ships, and what it decodes to is what is scored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post import artifacts as requant
from pgolf_post.base.progress import hushed
from pgolf_post.base.storage import read_json, sha256_file
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.derived import derived_id, intact_meta, store
from pgolf_post.pack.artifact import read_artifact, write_verified
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.predict import SizePredictor
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.score.cached import ScoredModel
from pgolf_post.settings import parse_settings
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.common import KEPT_SMALL, Places, Recent, Spending
from pgolf_post.sweep.settings import TrialSettings, trial_plan
from pgolf_post.sweep.weights import jittered

BeforePacking = Callable[[Callable[[], int]], None]  # is given a function that predicts the artifact's bytes


@dataclass(frozen=True)
class Quantized:
    """A trial's artifact on disk and the tensors it decodes to, or the weights themselves."""

    subject: ScoredModel
    tensors: Callable[[], Mapping[str, Tensor]]
    facts: Mapping[str, Any]  # artifact_id, artifact_bytes, symbols_sha256 …
    content_sha256: str  # of symbols, factors and floats: what a NO-OP is judged by


def unquantized(view: View) -> Quantized:
    """The weights themselves as what is scored."""
    subject = ScoredModel(view.id, view.config, str(view), view.checkpoint.path / "derived")
    return Quantized(subject, lambda: view.tensors, {}, view.id)


def artifact_identity(settings: TrialSettings) -> dict[str, Any]:
    """What decides an artifact beside weights and statistics; a repeat with jittered scales is one of its own."""
    jitter = {"jitter_seed": settings.jitter_seed} if settings.jitter_seed else {}
    return {**trial_plan(settings).identity(), "codec": settings.codec, **jitter}


def artifact_folder(view: View, stats_id: str, settings: TrialSettings) -> tuple[Path, str]:
    """Where `requant` would put a trial's artifact, and its id."""
    identity = artifact_identity(settings)
    artifact_id = derived_id(requant.STAGE, requant.STAGE_VERSION, [view.id, stats_id], identity)
    return view.checkpoint.derived(requant.STAGE, artifact_id), artifact_id


class Artifacts:
    """Finds and makes trials' artifacts; the tensors of the last one decoded stay in memory."""

    def __init__(self, places: Places, spending: Spending, factors: Callable[[Stats], StatsFactors]) -> None:
        self.places, self.spending, self._factors = places, spending, factors
        self._quantized = Recent[Quantized](KEPT_SMALL)
        self._predictor = SizePredictor()
        self._decoded = Recent[Mapping[str, Tensor]](1)  # sha256 of a file → its tensors

    def quantized(
        self, view: View, stats: Stats, settings: TrialSettings, before_packing: BeforePacking | None = None
    ) -> Quantized:
        """The packed artifact of a trial, read back; found if it is there.

        `before_packing` is called after quantizing, and after finding; it may raise what ends the trial.
        Raises VerificationError if the file does not decode to the symbols that were packed.
        """
        folder, artifact_id = artifact_folder(view, stats.id, settings)
        if artifact_id in self._quantized and before_packing is None:
            return self._quantized[artifact_id]
        with claim(self.places.locks, f"artifact-{artifact_id}", wait=True):
            with hushed():
                meta = intact_meta(folder, requant.PAYLOAD)
            if meta is None or "content_sha256" not in meta:
                meta = self._make(view, stats, settings, folder, before_packing)
            else:
                self.spending.shared.append("artifact")
                if before_packing:
                    before_packing(lambda: self._predicted(meta, view, stats, settings))
        path = folder / requant.PAYLOAD
        facts = {
            "artifact_id": artifact_id,
            "artifact_sha256": meta["payload_sha256"],
            "artifact_bytes": path.stat().st_size,
            "symbols_sha256": meta["symbols_sha256"],
        }
        subject = ScoredModel(facts["artifact_sha256"], view.config, str(path), view.checkpoint.path / "derived")
        made = Quantized(subject, lambda: self._tensors(path, subject.id), facts, str(meta["content_sha256"]))
        return self._quantized.keep(artifact_id, made)

    def _quantize(self, view: View, stats: Stats, settings: TrialSettings) -> QuantizedModel:
        return quantize_view(jittered(view, settings.jitter_seed), stats, trial_plan(settings), self._factors(stats))

    def _predicted(self, meta: Mapping[str, Any], view: View, stats: Stats, settings: TrialSettings) -> int:
        """The bytes predicted of a found artifact: remembered, or quantized again to be predicted."""
        if "predicted_bytes" in meta:
            return int(meta["predicted_bytes"])
        with self.spending.timed("predict"):
            return self._predictor.predict_bytes(self._quantize(view, stats, settings))

    def _make(
        self, view: View, stats: Stats, settings: TrialSettings, folder: Path, before_packing: BeforePacking | None
    ) -> dict[str, Any]:
        """Quantize and pack; the meta.json that `folder` has then."""
        packing = parse_settings(PackSettings, {"codec": settings.codec}, "sweep")
        with self.spending.timed("quantize"):
            model = self._quantize(view, stats, settings)
            facts = requant.artifact_facts(model, view, stats, packing.codec)

        def predict() -> int:
            with self.spending.timed("predict"):
                facts["predicted_bytes"] = self._predictor.predict_bytes(model)
            return int(facts["predicted_bytes"])

        if before_packing:
            before_packing(predict)

        def make(building: Path) -> Mapping[str, Any]:
            self._pack(model, packing, facts, folder.parent, building / requant.PAYLOAD)
            return facts

        config = {"stage": requant.STAGE, "version": requant.STAGE_VERSION, "view": view.name, "view_id": view.id}
        config |= {"stats_id": stats.id, "plan": trial_plan(settings).name, **artifact_identity(settings)}
        with self.spending.timed("pack"):
            return store(folder, requant.PAYLOAD, config, make)

    def _pack(
        self, model: QuantizedModel, packing: PackSettings, facts: Mapping[str, Any], stage: Path, path: Path
    ) -> None:
        """Write a model's file at `path`, as a link where an artifact under `stage` is the very same."""
        twin = _twin(stage, facts)
        if twin is not None:
            self.spending.shared.append("pack")
            _link(twin, path)
            return
        decoded = write_verified(path, pack(model, packing), facts["symbols_sha256"])
        self._decoded.keep(sha256_file(path), _as_tensors(decoded.tensors))

    def _tensors(self, path: Path, sha256: str) -> Mapping[str, Tensor]:
        if sha256 not in self._decoded:
            self._decoded.keep(sha256, _as_tensors(read_artifact(path).tensors))
        return self._decoded[sha256]


def _as_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _twin(stage: Path, facts: Mapping[str, Any]) -> Path | None:
    """An artifact that was made of the very same model by the same codec."""
    for meta_path in sorted(stage.glob("*/meta.json")):
        meta = read_json(meta_path)
        if all(meta.get(key) == facts[key] for key in ("content_sha256", "codec", "lineage")):
            path = meta_path.parent / requant.PAYLOAD
            if path.is_file() and sha256_file(path) == meta["payload_sha256"]:
                return path
    return None


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        destination.write_bytes(source.read_bytes())

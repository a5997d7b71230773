"""A trial's artifact: found where `requant` or `fit` would have put it, or made and put there.

A model that another trial packed already is not packed again (the artifact is a link to its file). A file is decoded
once, by the decoder that ships: what it decodes to when it is verified is what is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pgolf_post.artifacts import ArtifactKey, PackedArtifact, find, keep
from pgolf_post.base.progress import hushed
from pgolf_post.pack.report.predict import SizePredictor
from pgolf_post.score.cached import ScoredModel
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.quantizers import Quantizer, Request
from pgolf_post.sweep.recent import KEPT_SMALL, Recent
from pgolf_post.sweep.spending import Spending
from pgolf_post.sweep.trial_model import TrialModel

BeforePacking = Callable[[Callable[[], int]], None]  # is given a function that predicts the artifact's bytes


class Artifacts:
    """Finds and makes trials' artifacts; the tensors of the last one decoded stay in memory."""

    def __init__(self, places: Places, spending: Spending, quantizers: Mapping[str, Quantizer]) -> None:
        self.places, self.spending, self.quantizers = places, spending, quantizers
        self._predictor = SizePredictor()
        self._models = Recent[TrialModel](KEPT_SMALL)
        self._decoded = Recent[Mapping[str, Tensor]](1)  # sha256 of a file → its tensors

    def model(self, request: Request, before_packing: BeforePacking | None = None) -> TrialModel:
        """Return what a trial scores: its artifact's weights, found if the artifact is there.

        `before_packing` is called after quantizing, and after finding; it may raise what ends the trial.
        Raises VerificationError if the file does not decode to the symbols that were packed.
        """
        asked = _asked(request)
        if asked in self._models and before_packing is None:
            return self._models[asked]
        key = self.quantizers[request.settings.method].key(request)
        with claim(self.places.locks, f"artifact-{key.id}", wait=True):
            with hushed():
                artifact = find(key)
            if artifact is None or "content_sha256" not in artifact.meta:
                artifact = self._make(request, key, before_packing)
            else:
                self.spending.shared.append("artifact")
                if before_packing:
                    before_packing(self._prediction(artifact))
        return self._models.keep(asked, self._trial_model(request, artifact))

    def _trial_model(self, request: Request, artifact: PackedArtifact) -> TrialModel:
        """Return an artifact as what is scored; what it was verified as stays at hand, and is let go of with it."""
        sha256, symbols = str(artifact.meta["payload_sha256"]), artifact.symbols_sha256
        facts: dict[str, Any] = {"artifact_id": artifact.id, "artifact_sha256": sha256}
        facts |= {"artifact_bytes": artifact.path.stat().st_size, "symbols_sha256": symbols}
        if artifact.verified is not None:
            self._decoded.keep(sha256, _as_tensors(artifact.verified.tensors))
        view, closed = request.view, artifact.forgotten()
        subject = ScoredModel(sha256, view.config, str(artifact.path), view.checkpoint.path / "derived")
        return TrialModel(subject, lambda: self._tensors(closed), facts, str(artifact.meta["content_sha256"]))

    def _prediction(self, artifact: PackedArtifact) -> Callable[[], int]:
        """Return a function that says what was predicted of a found artifact, or predicts it of what it holds."""

        def predict() -> int:
            if "predicted_bytes" in artifact.meta:
                return int(artifact.meta["predicted_bytes"])
            with self.spending.timed("predict"):
                decoded = artifact.decoded()
                self._decoded.keep(str(artifact.meta["payload_sha256"]), _as_tensors(decoded.tensors))
                return self._predictor.predict_bytes(decoded.model)

        return predict

    def _make(self, request: Request, key: ArtifactKey, before_packing: BeforePacking | None) -> PackedArtifact:
        """Quantize and pack."""
        quantizer = self.quantizers[request.settings.method]
        with self.spending.timed(quantizer.seconds):
            made = quantizer.make(request)
        facts = dict(made.facts)

        def predict() -> int:
            with self.spending.timed("predict"):
                facts["predicted_bytes"] = self._predictor.predict_bytes(made.model)
            return int(facts["predicted_bytes"])

        if before_packing:
            before_packing(predict)
        with self.spending.timed("pack"):
            codec = request.settings.codec
            about = (made.packed, facts, made.phases)
            artifact = keep(key, made.model, request.stats, codec, *about, link_twins=True)
        if artifact.verified is None:
            self.spending.shared.append("pack")
        return artifact

    def _tensors(self, artifact: PackedArtifact) -> Mapping[str, Tensor]:
        sha256 = str(artifact.meta["payload_sha256"])
        if sha256 not in self._decoded:
            self._decoded.keep(sha256, _as_tensors(artifact.decoded().tensors))
        return self._decoded[sha256]


def _asked(request: Request) -> str:
    """Return what decides an artifact, before anything is done to find its key."""
    spec, settings = request.spec, request.settings
    fields = {"method", "plan", "set", "fit", "codec", "jitter_seed", "calibration"}
    counted = f"{spec.budget_bytes}:{spec.code}"
    return f"{request.view.id}:{request.stats.id}:{counted}:{settings.model_dump_json(include=fields)}"


def _as_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

"""Averages scored as `fit` will leave them: the loss of an average, plus what its rounding is expected to cost.

What ships is the rounded average, and the average that loses least before rounding need not lose least after it: a
longer average has another spread of weights, another curvature, and other bytes. So a candidate is rounded to the byte
budget, by the same `fit` as later but with few states, without κ, and from less text, which is enough to rank; its
artifact is packed and decoded. The score of a window is the average's own loss on it plus the divergence of the decoded
model from the average, which is what rounding costs in expectation, with a tenth of the noise of measured losses
(score/compare/expected.py). As the budget grows the divergence goes to zero, and the order to that of the losses.

Statistics, artifacts and all else that `fit` keeps are found again: an interrupted search goes on where it stopped.
They lie with a checkpoint whose weights the average is, else with the last of its parts, where they count as orphans
(`pgolf-post cache prune --orphans`): averages that lose are not saved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pgolf_post.artifacts import PackedArtifact
from pgolf_post.average.linear import Blend
from pgolf_post.average.search import Sample
from pgolf_post.base.ranks import ALONE
from pgolf_post.cache import entry_at
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.calibrate.stage import STATS
from pgolf_post.checkpoint import View, view_id
from pgolf_post.data import DataFolder
from pgolf_post.families import load_module
from pgolf_post.fit.artifact import fit
from pgolf_post.fit.limits import require_less_than_fp16
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.expected import score_against
from pgolf_post.score.spans import Span

ENOUGH = FitSettings(kappa="off", trellis_states=8)  # to rank averages


@dataclass
class RoundedAverage:
    """One candidate: its artifact, what that took, and sums over the windows scored so far."""

    artifact: PackedArtifact
    seconds: dict[str, float]  # by step; those of results found are as they were when made
    disk_bytes: int  # of statistics and artifact
    before: list[Score] = field(default_factory=list)  # losses of the average, by round
    gap: list[Score] = field(default_factory=list)  # divergences in the place of nats

    @property
    def before_bpb(self) -> float:
        """Loss before rounding."""
        return _bpb(self.before)

    @property
    def gap_bpb(self) -> float:
        """Expected loss by rounding."""
        return _bpb(self.gap)

    def facts(self) -> dict[str, Any]:
        """Return the candidate as JSON."""
        sums = {"before_bpb": self.before_bpb, "gap_bpb": self.gap_bpb}
        seconds = {f"{step}_seconds": round(value, 3) for step, value in self.seconds.items()}
        made = {"artifact": str(self.artifact.path), "artifact_bytes": self.artifact.num_bytes}
        return {**sums, **made, "disk_bytes": self.disk_bytes, **seconds}


class AfterFit:
    """Scores blends of a search by what they are expected to lose once rounded to a byte budget."""

    def __init__(
        self,
        data: DataFolder,  # its training split gives the statistics
        budget: int,  # bytes of the artifact
        calibration: CalibrationSettings,
        settings: FitSettings = ENOUGH,
    ) -> None:
        self.data, self.budget, self.settings = data, budget, settings
        self.calibration = calibration.model_copy(update={"fisher": True})
        self.averages: dict[str, RoundedAverage] = {}

    def __call__(self, name: str, blend: Blend, sample: Sample, chosen: np.ndarray) -> Score:
        """Return a blend's expected loss on some windows of a sample. Raises what `fit` and `score_against` do."""
        if name not in self.averages:
            self.averages[name] = self.rounded(blend)
        one, started = self.averages[name], time.perf_counter()
        decoded = {key: torch.from_numpy(array) for key, array in one.artifact.decoded().tensors.items()}
        weights = (blend.tensors, decoded)
        models = [load_module(blend.reference.config, each, name).to(ALONE.device) for each in weights]
        spans = [Span(start, length, length) for start, length in sample.spans]
        sums = score_against(models[0], models[1:], sample.tokens, sample.token_bytes, spans, chosen)
        one.before.append(sums.reference)
        one.gap.append(sums.divergences[0])
        one.seconds["scoring"] += (seconds := time.perf_counter() - started)
        return replace(sums.reference, unit_nats=sums.reference.unit_nats + one.gap[-1].unit_nats, seconds=seconds)

    def rounded(self, blend: Blend) -> RoundedAverage:
        """Return a blend with the artifact that `fit` makes of it by these settings, from the cache or made now."""
        view = view_of(blend)
        require_less_than_fp16(view, self.budget)  # before anything is computed
        stats = calibrate(view, self.data, self.calibration)
        started = time.perf_counter()
        fitter = prepare(view, self.data, self.calibration, self.settings, stats=stats)
        preparing = time.perf_counter() - started
        artifact = fit(view, self.data, self.budget, prepared=fitter).forgotten()
        seconds = {"statistics": stats.seconds, "fit": preparing + float(artifact.meta["seconds"]), "scoring": 0.0}
        folders = (view.checkpoint.derived(STATS.name, stats.id), artifact.folder)
        return RoundedAverage(artifact, seconds, sum(entry_at(folder).num_bytes for folder in folders))

    def facts(self) -> dict[str, Any]:
        """Return budget, settings and candidates as JSON."""
        settings = {"trellis_states": self.settings.trellis_states, "kappa": self.settings.kappa}
        rows = {name: one.facts() for name, one in self.averages.items()}
        return {"budget": self.budget, "calibration_tokens": self.calibration.tokens, **settings, "averages": rows}


def view_of(blend: Blend) -> View:
    """Return a blend as a view, whose results are kept by the last of its parts; a sole part is that view itself."""
    last = blend.parts[-1]
    if len(blend.parts) == 1:
        return last.checkpoint.load(last.view)
    return View(last.checkpoint, "raw", view_id(blend.tensors, blend.reference.config), blend.tensors)


def _bpb(scores: Sequence[Score]) -> float:
    nats, num_bytes = sum(score.nats for score in scores), sum(score.bytes for score in scores)
    return float(nats / np.log(2) / num_bytes)

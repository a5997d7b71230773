"""A trial's scores: made by the stages of STAGES, found if they were made before.

An artifact is scored once by a stage, whatever the number of trials that lead to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pgolf_post.base.ranks import Ranks
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.score.bpb import Score
from pgolf_post.score.cached import load_score
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.recent import KEPT_SMALL, Recent
from pgolf_post.sweep.settings import SweepSpec, TrialSettings
from pgolf_post.sweep.spending import Spending
from pgolf_post.sweep.stages import STAGES
from pgolf_post.sweep.stages.base import Job, Scorer, Window
from pgolf_post.sweep.trial_model import TrialModel


def stage_protocol(spec: SweepSpec, stage: str, settings: TrialSettings, train_seq_len: int) -> Protocol:
    """Return what a scoring stage does to a model trained on that length. Raises SettingsError."""
    given = spec.stages.seq_len
    window = Window(given or train_seq_len, given, settings.stage_changes(stage))
    return STAGES[stage].protocol(spec.stages.get(stage), window)


@dataclass(frozen=True)
class OneDevice(Ranks):
    """One process alone, on a device that it was given."""

    chosen: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        return self.chosen


class Scores:
    """Finds, makes and holds trials' scores, with one model whose weights are swapped."""

    def __init__(self, places: Places, spending: Spending, compiled: bool, device: torch.device | None) -> None:
        self.places, self.spending = places, spending
        ranks = Ranks() if device is None else OneDevice(chosen=device)
        self.scorer = Scorer(ranks, ModelPool(compiled), ModelPool(compiled))
        self._scores = Recent[tuple[dict[str, Any], Score]](KEPT_SMALL)

    def score(
        self,
        spec: SweepSpec,
        stage: str,
        settings: TrialSettings,
        model: TrialModel,
        reference: TrialModel,  # the weights before quantization
        view: View,
        data: DataFolder,
    ) -> tuple[dict[str, Any], Score]:
        """Return a scoring stage's facts and sums; found if they are there."""
        protocol, chosen = stage_protocol(spec, stage, settings, view.train_seq_len), spec.stages.get(stage)
        compared = reference.subject.id if STAGES[stage].compares else ""
        asked = f"{protocol.model_dump_json()}{chosen.model_dump_json(exclude={'only_if'})}"
        key = f"{model.subject.id}:{compared}:{data.manifest_sha256}:{stage}:{asked}"
        if key in self._scores:
            self.spending.shared.append(stage)
            return self._scores[key]
        job = Job(chosen, protocol, model, reference, data)
        with self.spending.timed(stage), claim(self.places.locks, f"{stage}-{model.subject.id}", wait=True):
            facts, cached = STAGES[stage].score(self.scorer, job)
        if cached:
            self.spending.shared.append(stage)
        return self._scores.keep(key, (facts, load_score(facts)))

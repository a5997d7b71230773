"""The workbench of trials: weights and Hessians are loaded once, factorized once, and one model's weights are swapped.

weights.py       what trials start from              quantizers.py   by a plan, or to a byte budget
calibration.py   data, statistics, factors           artifacts.py    quantized, packed, read back
                                                     scores.py       stages, screens and protocols

Every result is a derived folder beside its checkpoint, under the same id that `calibrate`, `requant`, `fit` and `eval`
use, so a sweep finds what they made and they find what it made. Several processes may work at once: a result that two
of them need is made by one while the other waits.
"""

from __future__ import annotations

import torch

from pgolf_post.artifacts import ARTIFACT, FITTED
from pgolf_post.calibrate.stage import STATS
from pgolf_post.checkpoint import View
from pgolf_post.score.cached import SCORE
from pgolf_post.sweep.artifacts import Artifacts, BeforePacking
from pgolf_post.sweep.calibration import Calibration
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.quantizers import ByFit, ByPlan, Request
from pgolf_post.sweep.scores import Scores
from pgolf_post.sweep.settings import SweepSpec, TrialSettings
from pgolf_post.sweep.spending import Spending
from pgolf_post.sweep.stages import STAGES
from pgolf_post.sweep.trial_model import TrialModel
from pgolf_post.sweep.weights import Weights

IN_EVERY_ID = ("screen", "expected")  # stages whose version is part of every trial's id, run or not


def versions(spec: SweepSpec, settings: TrialSettings) -> dict[str, int]:
    """Return the versions of the stages that make a trial: a stage that works otherwise makes another trial."""
    stages = {name: row.version for name, row in STAGES.items() if row.version is not None}
    run = [name for name in stages if name in IN_EVERY_ID or name in spec.stages.scoring()]
    scored = {name: stages[name] for name in run}
    fit = {"fit": FITTED.version} if settings.method == "fit" else {}
    return {"stats": STATS.version, "artifact": ARTIFACT.version, "score": SCORE.version, **scored, **fit}


class Workbench:
    """One process's share of a sweep: caches in memory over results on disk."""

    def __init__(self, places: Places, compiled: bool = False, device: torch.device | None = None) -> None:
        self.spending = Spending()
        self.weights = Weights(places, self.spending)
        self.calibration = Calibration(places, self.spending)
        by_plan, by_fit = ByPlan(self.calibration.factors), ByFit(places, self.spending)
        self.artifacts = Artifacts(places, self.spending, {"plan": by_plan, "fit": by_fit})
        self.scores = Scores(places, self.spending, compiled, device)

    def request(self, spec: SweepSpec, settings: TrialSettings, view: View) -> Request:
        """Return what a trial asks to be quantized, its statistics collected."""
        stats, data = self.calibration.stats(spec, settings, view), self.calibration.data(spec, view.checkpoint)
        return Request(spec, settings, view, stats, data)

    def quantized(
        self, spec: SweepSpec, settings: TrialSettings, view: View, before_packing: BeforePacking | None = None
    ) -> TrialModel:
        """Return what a trial's artifact decodes to (see `Artifacts.model`)."""
        return self.artifacts.model(self.request(spec, settings, view), before_packing)

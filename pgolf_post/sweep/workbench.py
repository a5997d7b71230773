"""What trials share: weights and Hessians loaded once, Hessians factorized once, one model whose weights are swapped.

weights.py   what trials start from           artifacts.py   quantized, packed, read back
calibration.py   data, statistics, factors    scores.py      screens and protocols

Every result is a derived folder beside its checkpoint, under the same id that `calibrate`, `requant` and `eval` use, so
a sweep finds what they made and they find what it made. Several processes may work at once: a result that two of them
need is made by one while the other waits.
"""

from __future__ import annotations

import torch

from pgolf_post import artifacts as requant
from pgolf_post.calibrate.stage import STATS
from pgolf_post.score.cached import SCORE
from pgolf_post.sweep.artifacts import Artifacts
from pgolf_post.sweep.calibration import Calibration
from pgolf_post.sweep.common import Places, Spending
from pgolf_post.sweep.scores import SCREEN_VERSION, Scores
from pgolf_post.sweep.settings import DRAWN
from pgolf_post.sweep.weights import Weights

VERSIONS = {
    "stats": STATS.version,
    "artifact": requant.STAGE_VERSION,
    "score": SCORE.version,
    **dict.fromkeys(DRAWN, SCREEN_VERSION),
}  # a stage that works otherwise than before makes other trials


class Workbench:
    """One process's share of a sweep: caches in memory over results on disk."""

    def __init__(self, places: Places, compiled: bool = False, device: torch.device | None = None) -> None:
        self.spending = Spending()
        self.weights = Weights(places, self.spending)
        self.calibration = Calibration(places, self.spending)
        self.artifacts = Artifacts(places, self.spending, self.calibration.factors)
        self.scores = Scores(places, self.spending, compiled, device)

"""Trials' calibration: the data folder, the statistics, the factorized Hessians.

All three are held in memory; statistics are those that `calibrate` keeps on disk, found there or put there.
"""

from __future__ import annotations

from pathlib import Path

from pgolf_post.artifacts import plan_calibration
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.score.cached import require_tokenizer
from pgolf_post.sweep.block_rules import trial_plan
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.recent import Recent
from pgolf_post.sweep.settings import SweepSpec, TrialSettings
from pgolf_post.sweep.spending import Spending


def calibration_of(settings: TrialSettings) -> CalibrationSettings:
    """Return a trial's calibration settings, with the backward half where a fit or the plan reads it."""
    if settings.method == "fit":
        return settings.calibration.model_copy(update={"fisher": True})
    return plan_calibration(settings.calibration, trial_plan(settings))


class Calibration:
    """Finds, makes and holds trials' statistics."""

    def __init__(self, places: Places, spending: Spending) -> None:
        self.places, self.spending = places, spending
        self._data: dict[str, DataFolder] = {}
        self._stats = Recent[Stats]()
        self._factors = Recent[StatsFactors]()

    def data(self, spec: SweepSpec, checkpoint: Checkpoint) -> DataFolder:
        """Return the data that a trial calibrates on and is scored on. Raises NotFoundError, MismatchError."""
        named = self.places.data or (Path(spec.data) if spec.data else None)
        folder = named or Path(str(checkpoint.meta.get("data_dir")))
        if str(folder) not in self._data:
            if not folder.is_dir():
                raise NotFoundError(
                    f"the data folder of {checkpoint.path} ({folder}) is not here", hint="pass --data FOLDER"
                )
            self._data[str(folder)] = DataFolder.open(folder)
        data = self._data[str(folder)]
        require_tokenizer(checkpoint.config, data, str(checkpoint.path))
        if named is None and data.manifest_sha256 != checkpoint.config["data"]["manifest_sha256"]:
            raise MismatchError(
                f"{folder} was rebuilt since {checkpoint.path} was trained on it", hint=f"--data {folder}"
            )
        return data

    def stats(self, spec: SweepSpec, settings: TrialSettings, view: View) -> Stats:
        """Return the view's statistics; collected by one process while others that need them wait."""
        data = self.data(spec, view.checkpoint)
        wanted = calibration_of(settings)
        key = f"{view.id}:{data.manifest_sha256}:{wanted.model_dump_json()}"
        if key in self._stats:
            self.spending.shared.append("calibrate")
            return self._stats[key]
        with self.spending.timed("calibrate"), claim(self.places.locks, f"stats-{view.id}", wait=True):
            stats = calibrate(view, data, wanted)
        if stats.cached:
            self.spending.shared.append("calibrate")
        return self._stats.keep(key, stats)

    def factors(self, stats: Stats) -> StatsFactors:
        """Return the statistics' factorized Hessians."""
        if stats.id not in self._factors:
            self._factors.keep(stats.id, StatsFactors(stats))
        return self._factors[stats.id]

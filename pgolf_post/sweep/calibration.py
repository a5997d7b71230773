"""What trials calibrate on and what comes of it: the data folder, the statistics, the factorized Hessians.

All three are held in memory; statistics are those that `calibrate` keeps on disk, found there or put there.
"""

from __future__ import annotations

from pathlib import Path

from pgolf_post.calibrate import Stats, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.score.cached import require_tokenizer
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.common import Places, Recent, Spending
from pgolf_post.sweep.settings import SweepSpec, TrialSettings


class Calibration:
    """Finds, makes and holds trials' statistics."""

    def __init__(self, places: Places, spending: Spending) -> None:
        self.places, self.spending = places, spending
        self._data: dict[str, DataFolder] = {}
        self._stats = Recent[Stats]()
        self._factors = Recent[StatsFactors]()

    def data(self, spec: SweepSpec, checkpoint: Checkpoint) -> DataFolder:
        """What a trial calibrates on and is scored on. Raises NotFoundError, MismatchError."""
        named = self.places.data or (Path(spec.data) if spec.data else None)
        found = named or Path(str(checkpoint.meta.get("data_dir")))
        if str(found) not in self._data:
            if not found.is_dir():
                raise NotFoundError(
                    f"the data folder of {checkpoint.path} ({found}) is not here", hint="pass --data FOLDER"
                )
            self._data[str(found)] = DataFolder.open(found)
        data = self._data[str(found)]
        require_tokenizer(checkpoint.config, data, str(checkpoint.path))
        if named is None and data.manifest_sha256 != checkpoint.config["data"]["manifest_sha256"]:
            raise MismatchError(
                f"{found} was rebuilt since {checkpoint.path} was trained on it", hint=f"--data {found}"
            )
        return data

    def stats(self, spec: SweepSpec, settings: TrialSettings, view: View) -> Stats:
        """The view's statistics; collected by one process while others that need them wait."""
        data = self.data(spec, view.checkpoint)
        key = f"{view.id}:{data.manifest_sha256}:{settings.calibration.model_dump_json()}"
        if key in self._stats:
            self.spending.shared.append("calibrate")
            return self._stats[key]
        with self.spending.timed("calibrate"), claim(self.places.locks, f"stats-{view.id}", wait=True):
            stats = calibrate(view, data, settings.calibration)
        if stats.cached:
            self.spending.shared.append("calibrate")
        return self._stats.keep(key, stats)

    def factors(self, stats: Stats) -> StatsFactors:
        """The statistics' factorized Hessians."""
        if stats.id not in self._factors:
            self._factors.keep(stats.id, StatsFactors(stats))
        return self._factors[stats.id]

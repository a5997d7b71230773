"""The folders that a sweep reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Places:
    """The folders of a sweep."""

    checkpoint: Path | None = None  # of trials that name none
    data: Path | None = None
    root: Path = Path("checkpoints")  # the ledger, and runs that trials train
    results: Path = Path("sweeps/results")
    derived: Path | None = None  # of statistics, artifacts and scores, in place of the checkpoints' own folders

    @property
    def locks(self) -> Path:
        return self.results / "locks"

"""What the parts of a workbench share: where things are, what a trial spends, and what is held in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

KEPT = 3  # sets of weights, and of factorized Hessians, held at once
KEPT_SMALL = 64  # artifacts' facts and scores' sums


@dataclass
class Places:
    """Where things are."""

    checkpoint: Path | None = None  # of trials that name none
    data: Path | None = None
    root: Path = Path("checkpoints")  # the ledger, and runs that trials train
    results: Path = Path("sweeps/results")

    @property
    def locks(self) -> Path:
        return self.results / "locks"


@dataclass
class Spending:
    """What the current trial took by stage, and which stages found their result made."""

    seconds: dict[str, float] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    def start_trial(self) -> None:
        """Forget the last trial's."""
        self.seconds, self.shared = {}, []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage's, also where the block raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    @contextmanager
    def unshared(self) -> Iterator[None]:
        """What a block finds made is not said of the trial."""
        before = list(self.shared)
        try:
            yield
        finally:
            self.shared = before


class Recent(dict[str, T]):
    """The last few values by key; the oldest goes first."""

    def __init__(self, most: int = KEPT) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: str, value: T) -> T:
        """Add a value, letting go of the oldest; returns it."""
        self[key] = value
        while len(self) > self.most:
            del self[next(iter(self))]
        return value

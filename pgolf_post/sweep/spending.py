"""Costs of a trial: seconds by stage, and the stages whose result was cached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class BudgetSpentError(Exception):
    """Raised where a sweep's seconds are spent amid a trial: the trial has no row, and is taken up by the next run."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message, seconds)  # both, so that it can be sent from one process to another
        self.seconds = seconds

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Spending:
    """The seconds of the current trial by stage, and the stages that were cache hits."""

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
        """Do not attribute cache hits inside this block to the trial."""
        before = list(self.shared)
        try:
            yield
        finally:
            self.shared = before

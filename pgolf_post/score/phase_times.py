"""The seconds of an evaluation per phase, two sums, and a budget that is enforced.

The challenge gives an evaluation 600 s. *Strict* counts every phase from the start of the command; *by convention* is
what record logs report: scoring and adapting, without loading, decoding and compiling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from pgolf_post.base.progress import say
from pgolf_post.ledger.phases import SCORING

WARN_SHARE = 0.8

Phase = Literal["load", "decompress", "compile", "score", "adapt"]


class PhaseTimes:
    """Seconds of each phase, in the order in which phases first ran. Phases do not nest."""

    def __init__(self, budget_seconds: float | None = None) -> None:
        self.seconds: dict[Phase, float] = {}
        self.budget_seconds = budget_seconds
        self._warned = False

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the seconds spent inside to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def strict(self) -> float:
        return sum(self.seconds.values())

    @property
    def by_convention(self) -> float:
        return sum(seconds for name, seconds in self.seconds.items() if name in SCORING)

    def over_budget(self) -> bool:
        """Return whether the strict sum has reached the budget; says so once at 80 % of it."""
        if self.budget_seconds is None:
            return False
        if not self._warned and self.strict >= WARN_SHARE * self.budget_seconds:
            self._warned = True
            say(f"warning: {self.strict:.0f} s of the budget's {self.budget_seconds:.0f} s are spent")
        return self.strict >= self.budget_seconds

    def facts(self) -> dict[str, float]:
        """Return seconds per phase, both sums and the budget if there is one, as JSON facts."""
        phases = {f"{name}_seconds": round(value, 3) for name, value in self.seconds.items()}
        totals = {"strict_seconds": round(self.strict, 3), "convention_seconds": round(self.by_convention, 3)}
        return {**phases, **totals, **({} if self.budget_seconds is None else {"time_budget": self.budget_seconds})}

    def load(self, seconds: Mapping[Phase, float]) -> None:
        """Add the phases of an earlier, interrupted part of the same run."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

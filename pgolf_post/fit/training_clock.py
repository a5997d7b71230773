"""The seconds that touch training data: they count against the challenge's training time.

Statistics, κ, fine-tuning and distillation read training text, so a submission that fits its artifact has to do them
within its 600 seconds. Each is timed; where a limit is set, a step that would not fit any more is left out, and named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pgolf_post.base.progress import say
from pgolf_post.errors import SettingsError


@dataclass
class Step:
    """One step under way."""

    more: float = 0.0

    def add(self, seconds: float) -> None:
        """Add the seconds that it took before, when its cached result was made."""
        self.more += seconds


@dataclass
class TrainingClock:
    """Adds up steps that read training text."""

    limit: float | None = None  # seconds
    seconds: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, name: str, seconds: float) -> None:
        """Count a step that was done elsewhere."""
        self.seconds[name] = round(seconds, 3)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time a step. Raises SettingsError if it ended beyond the limit and nothing came before it to be left out."""
        started, step = time.perf_counter(), Step()
        yield step
        self.seconds[name] = round(time.perf_counter() - started + step.more, 3)
        if self.limit is not None and self.total > self.limit and len(self.seconds) == 1:
            raise SettingsError(
                f"{name} took {self.total:.1f} s of training data; --train-seconds allows {self.limit:g}",
                hint="fewer --calibration-tokens, more ranks, or a GPU",
            )

    def allows(self, name: str, expected: float) -> bool:
        """Whether a step may start; if not, it is named as left out."""
        if self.limit is None or self.total + expected <= self.limit:
            return True
        self.dropped.append(name)
        say(
            f"left out: {name}, which would take about {expected:.1f} s; "
            f"{self.total:.1f} of {self.limit:g} s on training data are spent"
        )
        return False

"""Points gathered from the lines of a log: what is reported twice counts once, a restart takes back what it redoes.

A run that is resumed logs some steps again, an output that several ranks or handlers write has each line twice. A
report of an earlier step with another value is a restart: points from that step on are replaced. With the same value
it is an echo and changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from pgolf_post.curves.curve import Curve, Point


@dataclass
class Gathering:
    """The points of all curves of one log, while it is read."""

    points: dict[str, dict[float, Point]] = field(default_factory=dict)  # curve → step → its point
    repeated: int = 0
    restarts: list[float] = field(default_factory=list)  # steps at which a run began again
    not_finite: int = 0

    def add(self, curve: str, point: Point) -> None:
        """Take one point in; its step must be known."""
        assert point.step is not None
        if not math.isfinite(point.value):
            self.not_finite += 1
            return
        known = self.points.setdefault(curve, {})
        same = known.get(point.step)
        if same is not None and same.value == point.value:
            self.repeated += 1
            return
        if known and point.step <= next(reversed(known)):  # steps rise: a restart forgets those from it on
            self._restart(point.step)
        self.points.setdefault(curve, {})[point.step] = point

    def _restart(self, step: float) -> None:
        """Forget what every curve has from a step on."""
        if step not in self.restarts:
            self.restarts.append(step)
        for known in self.points.values():
            for later in [other for other in known if other >= step]:
                del known[later]

    def curves(self) -> dict[str, Curve]:
        """Return the curves, in the order of their first points, places filled in from each other."""
        made = {name: Curve.of(name, known.values()) for name, known in self.points.items() if known}
        return {name: _placed(curve, list(made.values())) for name, curve in made.items()}

    def notes(self) -> list[str]:
        """Return what was repaired, in words."""
        notes = [f"{self.repeated:,} values stand there twice"] if self.repeated else []
        if self.restarts:
            notes.append(f"the run began again at step {', '.join(f'{step:g}' for step in self.restarts)}")
        return notes + ([f"{self.not_finite:,} values are not finite, left out"] if self.not_finite else [])


def _placed(curve: Curve, others: list[Curve]) -> Curve:
    """Return a curve without seconds with those of another curve of the same run, by step."""
    source = max((other for other in others if other.has("seconds")), key=len, default=None)
    if source is None or curve.has("seconds"):
        return curve
    inside = (curve.step >= source.step[0]) & (curve.step <= source.step[-1])
    seconds = np.where(inside, np.interp(curve.step, source.step, source.seconds), np.nan)
    seconds = np.where(np.isfinite(curve.seconds), curve.seconds, seconds)
    seconds[(curve.step == 0) & np.isnan(seconds)] = 0.0  # scored before the first step
    return Curve(curve.name, curve.values, curve.step, curve.tokens, seconds)

"""Stopping a run that is worse than another: at chosen moments its training loss is compared with an older log's.

An experiment that has fallen behind at a quarter of its length seldom wins, and what is left of it costs money. The
comparison is that of `pgolf-post curves`, at the same step, tokens or seconds: the run's loss smoothed over a window
before the moment, the other one's around it. A run that stops leaves a checkpoint, so it can still go on (`--resume`):
moments that are behind do not come again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pgolf_post.base.progress import say
from pgolf_post.curves.comparing import Difference, compare_curves
from pgolf_post.curves.curve import Axis, Curve
from pgolf_post.curves.reading import read_log
from pgolf_post.settings import Settings

LOSS = "train_loss"


class StopSettings(Settings):
    """The run to compare with, the moments, and how much worse is too much."""

    against: Path | None = Field(None, description="a run's folder or a training log to compare with; default none")
    at: tuple[float, ...] = Field((0.25, 0.5), description="shares of the run at which the losses are compared")
    by: Axis = Field("step", description="compare at equal step, tokens or seconds")
    worse_by: float = Field(
        0.01, ge=0, description="nats per token by which the loss may be higher; a run above that ends"
    )
    window: float | None = Field(
        None, gt=0, description="units of `by` that are smoothed over, before the moment; default as for `curves`"
    )

    @model_validator(mode="after")
    def _reachable(self) -> StopSettings:
        outside = [moment for moment in self.at if not 0 < moment < 1]
        if outside or not self.at:
            raise ValueError(f"moments must lie strictly between 0 and 1, got {list(self.at)}")
        idle = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        if self.against is None and idle:
            raise ValueError(f"{', '.join(idle)} {'do' if len(idle) > 1 else 'does'} nothing without against")
        return self


class StopWatch:
    """The moments that are still ahead, and the curve that the run is compared with."""

    def __init__(self, settings: StopSettings, progress: float) -> None:
        """Read the log. Raises NotFoundError or MismatchError if it has no loss along the axis."""
        self.settings = settings
        self.pending = sorted(moment for moment in settings.at if moment > progress) if settings.against else []
        self.reference: Curve | None = None
        if settings.against is not None:
            self.reference = read_log(settings.against).curve(LOSS)
            self.reference.along(settings.by)

    def due(self, progress: float) -> bool:
        """Return whether a moment has come since the last call."""
        reached = [moment for moment in self.pending if moment <= progress]
        self.pending = self.pending[len(reached) :]
        return bool(reached)

    def compare(self, own_log: Path) -> Difference | None:
        """Return how the run stands now; None, and said, where the other one did not come as far."""
        assert self.reference is not None
        by, own = self.settings.by, read_log(own_log).curve(LOSS)
        now, places = float(own.along(by)[-1]), self.reference.along(by)
        start, end = float(places[0]), float(places[-1])
        if not start < now <= end:
            reach = f"reaches from {start:,g} to {end:,g} {by}"
            say(f"stop: {self.settings.against} {reach}, this run is at {now:,g}; not compared")
            return None
        return compare_curves(self.reference, own, by, [now], self.settings.window, trailing=True)[0]

    def verdict(self, difference: Difference) -> str | None:
        """Return why the run should end, or None if it may go on; says how it stands."""
        stands = stands_text(difference, self.settings)
        if difference.difference > self.settings.worse_by:
            return f"{stands}; stop.worse_by {self.settings.worse_by:g}"
        say(f"stop: {stands}; it goes on (stop.worse_by {self.settings.worse_by:g})")
        return None

    def facts(self, difference: Difference, reason: str) -> dict[str, Any]:
        """Return what meta.json says of a run that stopped."""
        return {"against": str(self.settings.against), "by": self.settings.by, "reason": reason, **difference.facts()}


def stands_text(difference: Difference, settings: StopSettings) -> str:
    """Return in words how two runs stand at a place."""
    error = "noise unknown" if difference.error is None else f"± {difference.error:.4f}"
    return (
        f"{LOSS} {difference.other:.4f} at {settings.by} {difference.at:,g}, {difference.difference:+.4f} ({error}) "
        f"from {settings.against}"
    )

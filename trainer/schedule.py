"""Learning rate, momentum and loops as pure functions of progress, in [0, 1].

Progress is the share of the run that is done, by steps or by training seconds, whichever is further. Keying everything
on it guards against the classic failure of this challenge: 20,000 iterations under a 600 s cap, so that a warm-down
planned for the last 1,200 iterations never began.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from pgolf_post.settings import Settings


class ScheduleSettings(Settings):
    """When the run ends and what happens on the way. At least one of `steps` and `seconds` is set."""

    steps: int | None = Field(None, ge=1, description="optimizer steps")
    seconds: float | None = Field(None, gt=0, description="training seconds, without validation and checkpoint writing")
    warmdown: float = Field(0.667, ge=0, le=1, description="share of the run over which the learning rate falls")
    lr_floor: float = Field(0.0, ge=0, le=1, description="lowest learning-rate multiplier")
    loops_at: float = Field(0.5, ge=0, le=1, description="progress at which depth recurrence starts")

    @model_validator(mode="after")
    def _ends(self) -> ScheduleSettings:
        if self.steps is None and self.seconds is None:
            raise ValueError("set schedule.steps, schedule.seconds, or both (the run ends at whichever comes first)")
        return self


def progress(settings: ScheduleSettings, step: int, train_seconds: float) -> float:
    """Share of the run that is done after `step` steps and `train_seconds` seconds of training."""
    by_steps = step / settings.steps if settings.steps else 0.0
    by_seconds = train_seconds / settings.seconds if settings.seconds else 0.0
    return min(1.0, max(by_steps, by_seconds))


def warmdown_start(settings: ScheduleSettings) -> float:
    """The progress at which the learning rate starts to fall."""
    return 1.0 - settings.warmdown


def lr_multiplier(settings: ScheduleSettings, at: float) -> float:
    """1 until warm-down starts, then linear to 0 at the end, never below the floor."""
    if at < warmdown_start(settings) or settings.warmdown == 0:
        return 1.0
    return max((1.0 - at) / settings.warmdown, settings.lr_floor)


def momentum_at(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Muon's momentum, linear from `start` to `end` over the first `warmup_steps` steps."""
    share = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return start + (end - start) * share

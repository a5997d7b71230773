"""Learning rate, weight decay, momentum and loops as pure functions of progress, in [0, 1], or of the step.

Progress is the share of the run that is done, by steps or by training seconds, whichever is further. Of the seconds
under the cap, those reserved for what follows training do not count. Keying everything on progress guards against the
classic failure of this challenge: 20,000 iterations under a 600 s cap, so that a warm-down planned for the last 1,200
iterations never began.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pgolf_post.settings import Settings
from trainer.schedule.clock import ClockName
from trainer.schedule.lr_schedules import ScheduleName, schedule_of
from trainer.schedule.points import Points, multiplier_along
from trainer.schedule.stages import StageSettings, require_in_order


class ScheduleSettings(Settings):
    """The end of the run and what happens on the way. At least one of `steps` and `seconds` is set."""

    steps: int | None = Field(None, ge=1, description="optimizer steps of the run")
    seconds: float | None = Field(
        None, gt=0, description="cap on training seconds; scoring and writing checkpoints do not count"
    )
    clock: ClockName = Field(
        "wall",
        description="what seconds are: wall = of optimizer steps; processor = processor seconds of the whole process, "
        "so that a busy machine trains as far as an idle one",
    )
    reserve_seconds: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="seconds of the cap that are kept free for what follows training; auto = measured beforehand",
    )
    hessian_seconds: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        None,
        description="seconds of collecting Hessians inside the cap; auto = measured; default none are collected there",
    )
    hessian_tokens: int = Field(
        65536, ge=2, description="training tokens of the Hessians that hessian_seconds = auto measures"
    )
    shape: ScheduleName = Field(
        "linear", description="shape of the learning rate: a name in trainer/schedule/lr_schedules.py"
    )
    lr_warmup: float = Field(0.0, ge=0, lt=1, description="share of the run over which the learning rate rises")
    warmdown: float = Field(
        0.667,
        ge=0,
        le=1,
        description="last share of the run: linear and wsd fall over it, and swa-blend averages its checkpoints",
    )
    lr_floor: float = Field(0.0, ge=0, le=1, description="lowest learning-rate multiplier, warm-up included")
    loops_at: float = Field(0.5, ge=0, le=1, description="progress at which depth recurrence starts")
    all_loops_at: float | None = Field(
        None,
        ge=0,
        le=1,
        description="progress from which all extra visits are active, and one alone from loops_at; default all at once",
    )
    weight_decay_taper_at: float | None = Field(
        None, ge=0, lt=1, description="progress from which weight decay falls linearly to 0; default never"
    )
    points: Points = Field(
        (),
        description="[progress, multiplier] of the learning rate, linear in between, instead of shape, lr_warmup and "
        "lr_floor; a progress given twice is a jump",
    )
    weight_decay_points: Points = Field(
        (), description="[progress, multiplier] of weight decay, linear in between, instead of weight_decay_taper_at"
    )

    stages: tuple[StageSettings, ...] = Field(
        (), description="other tokens of steps and windows from a progress on, one table [[schedule.stages]] each"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSettings:
        if self.steps is None and self.seconds is None:
            raise ValueError("set schedule.steps, schedule.seconds, or both (the run ends at whichever comes first)")
        if self.seconds is None and (self.reserve_seconds != "auto" or self.hessian_seconds is not None):
            raise ValueError("reserve_seconds and hessian_seconds are parts of schedule.seconds, which is not set")
        if self.seconds is None and self.clock != "wall":
            raise ValueError(f"clock {self.clock} is that of schedule.seconds, which is not set")
        if self.seconds is not None and self.reserve_seconds != "auto" and self.reserve_seconds >= self.seconds:
            raise ValueError(f"reserve_seconds {self.reserve_seconds} leaves nothing of seconds {self.seconds}")
        schedule = schedule_of(self.shape)
        if schedule.fixed_warmup is not None and self.lr_warmup:
            raise ValueError(
                f"shape {self.shape} warms up over {schedule.fixed_warmup:.3f} of the run; leave lr_warmup out"
            )
        if "warmdown" in schedule.reads and self.lr_warmup + self.warmdown > 1 + 1e-9:
            raise ValueError(
                f"lr_warmup {self.lr_warmup} + warmdown {self.warmdown} is {self.lr_warmup + self.warmdown:.3f} "
                "of the run, at most 1"
            )
        if self.all_loops_at is not None and self.all_loops_at < self.loops_at:
            raise ValueError(f"all_loops_at {self.all_loops_at} comes before loops_at {self.loops_at}")
        self._require_points_alone()
        require_in_order(self.stages)
        return self

    @property
    def wall_seconds(self) -> float | None:
        """The cap in wall seconds; None where there is none, or in processor seconds."""
        return self.seconds if self.clock == "wall" else None

    def _require_points_alone(self) -> None:
        """Refuse settings that points take the place of, and a learning rate that is always 0."""
        replaced = {"points": ("shape", "lr_warmup", "lr_floor"), "weight_decay_points": ("weight_decay_taper_at",)}
        for key, others in replaced.items():
            for other in others if getattr(self, key) else ():
                value = getattr(self, other)
                if value != type(self).model_fields[other].default:
                    raise ValueError(f"{other} {value} does nothing beside {key}; leave one of the two out")
        if self.points and not any(multiplier for _, multiplier in self.points):
            raise ValueError("points: every multiplier is 0, so that nothing is trained; one at least is above 0")


def progress(settings: ScheduleSettings, step: int, train_seconds: float, reserve_seconds: float = 0.0) -> float:
    """Return the share of the run that is done after `step` steps and `train_seconds` seconds of training.

    `reserve_seconds` of the cap are not trained in (`trainer.run.reserve`).
    """
    by_steps = step / settings.steps if settings.steps else 0.0
    by_seconds = train_seconds / (settings.seconds - reserve_seconds) if settings.seconds else 0.0
    return min(1.0, max(by_steps, by_seconds))


# ---- learning rate and weight decay --------------------------------------------------------------------------------


def warmup_end(settings: ScheduleSettings) -> float:
    """Return the progress at which the learning rate has risen to its peak."""
    fixed = schedule_of(settings.shape).fixed_warmup
    return settings.lr_warmup if fixed is None else fixed


def warmdown_start(settings: ScheduleSettings) -> float:
    """Return the progress at which the warm-down starts; never before a peak that the shape fixes."""
    return max(1.0 - settings.warmdown, schedule_of(settings.shape).fixed_warmup or 0.0)


def lr_multiplier(settings: ScheduleSettings, at: float) -> float:
    """Return the learning rate at progress `at` as a multiple of its peak: a linear rise, then the shape's fall.

    Points say it all where there are any.
    """
    if settings.points:
        return multiplier_along(settings.points, at)
    peak = warmup_end(settings)
    if at < peak:
        return max(at / peak, settings.lr_floor)
    return schedule_of(settings.shape).after_peak(settings, at, peak)


def weight_decay_multiplier(settings: ScheduleSettings, at: float) -> float:
    """Return 1 until the taper starts, then linear to 0 at the end, or what points say.

    The learning rate multiplies decay as well.
    """
    if settings.weight_decay_points:
        return multiplier_along(settings.weight_decay_points, at)
    start = settings.weight_decay_taper_at
    return 1.0 if start is None or at < start else (1.0 - at) / (1.0 - start)


# ---- momentum and loops --------------------------------------------------------------------------------------------


def momentum_at(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Return Muon's momentum, linear from `start` to `end` over the first `warmup_steps` steps."""
    share = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return start + (end - start) * share


def cyclic_momentum(step: int, low: float, high: float, cycle_steps: int) -> float:
    """Return a cosine: `high` at step 0, `low` half a cycle later, `high` again after `cycle_steps`."""
    phase = (step % cycle_steps) / cycle_steps
    return low + (high - low) * 0.5 * (1.0 + math.cos(2.0 * math.pi * phase))


def active_loops_at(settings: ScheduleSettings, num_loops: int, at: float) -> int:
    """Return how many extra visits are active at progress `at`: none, one (two-phase curriculum only), or all."""
    if at < settings.loops_at:
        return 0
    if settings.all_loops_at is None or at >= settings.all_loops_at:
        return num_loops
    return min(1, num_loops)

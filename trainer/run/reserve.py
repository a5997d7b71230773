"""Room under the cap: what must still happen inside `schedule.seconds` once the schedule has stopped the run.

The challenge gives training 600 s and counts everything that reads training data, Hessians too. A run that trains until
the cap has therefore lost: its last step ends after it, and so does all that follows. Three things follow:

    last step   time may be up just after a step began, so one whole step, with all loops on
    snapshot    the final copy of weights, averages and moments to the host; writing it goes on outside the cap
    Hessians    where the recipe collects them inside the cap: `schedule.hessian_seconds`, given or "auto"

`schedule.reserve_seconds` is their sum ("auto") or a number, which `--dry-run` holds against the sum. It is settled
once, before the clock starts, on synthetic tokens, and kept for the whole run, resumed parts included: progress stays
a pure function of step and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pgolf_post.errors import SettingsError
from trainer.config import Recipe
from trainer.schedule.functions import ScheduleSettings
from trainer.schedule.step_times import StepTimes

HESSIAN_STEP_SHARE = 2 / 3  # of a training step's time for as many tokens: a forward pass and as much again for Σxxᵀ


@dataclass(frozen=True)
class Reserve:
    """Seconds that a run keeps free under its cap, and what they are for."""

    seconds: float  # kept free: the recipe's number, or the sum of the three below
    last_step: float
    snapshot: float
    hessians: float | None  # None: not collected inside the cap
    origin: Literal["measured", "estimated"]  # of the three

    @property
    def needed(self) -> float:
        """Seconds that should be kept free."""
        return self.last_step + self.after_last_step

    @property
    def after_last_step(self) -> float:
        """Seconds of what follows the run's last step."""
        return self.snapshot + (self.hessians or 0.0)

    def __str__(self) -> str:
        hessians = "no Hessians" if self.hessians is None else f"Hessians {self.hessians:.3g} s"
        parts = f"last step {self.last_step:.3g} s, snapshot {self.snapshot:.3g} s, {hessians}; {self.origin}"
        short = self.needed - self.seconds
        return f"{self.seconds:.3g} s reserved ({parts})" + (f", {short:.3g} s short" if short > 1e-6 else "")


def make_reserve(
    schedule: ScheduleSettings,
    last_step: float,
    snapshot: float,
    auto_hessians: float,
    origin: Literal["measured", "estimated"],
) -> Reserve:
    """Return a reserve from its parts; numbers in the recipe take their place.

    Raises SettingsError if no time to train is left.
    """
    asked = schedule.hessian_seconds
    hessians = auto_hessians if asked == "auto" else asked
    reserve = Reserve(0.0, last_step, snapshot, hessians, origin)
    seconds = reserve.needed if schedule.reserve_seconds == "auto" else schedule.reserve_seconds
    reserve = replace(reserve, seconds=seconds)
    if schedule.seconds is not None and seconds >= schedule.seconds:
        raise SettingsError(
            f"schedule.seconds {schedule.seconds:g} leaves no time to train in: {reserve}",
            hint="raise schedule.seconds, or set schedule.reserve_seconds to what may be kept free",
        )
    return reserve


def estimate_reserve(recipe: Recipe, times: StepTimes) -> Reserve | None:
    """Return the reserve reckoned from step times alone, the snapshot taken as nothing; None without a cap."""
    if recipe.schedule.seconds is None:
        return None
    per_token = times.looped / recipe.data.batch_tokens
    hessians = HESSIAN_STEP_SHARE * per_token * recipe.schedule.hessian_tokens
    last_step = per_token * recipe.stages[-1].batch_tokens
    return make_reserve(recipe.schedule, last_step, 0.0, hessians, "estimated")


def resumed_reserve(schedule: ScheduleSettings, facts: Mapping[str, Any] | None) -> Reserve | None:
    """Return the reserve that a checkpoint's run began with, so that progress goes on.

    A number in the recipe takes its place. None without a cap, or where the checkpoint has none.
    """
    if schedule.seconds is None or facts is None:
        return None
    seconds = float(facts["seconds"]) if schedule.reserve_seconds == "auto" else schedule.reserve_seconds
    return replace(Reserve(**facts), seconds=seconds)

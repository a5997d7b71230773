"""The timeline of a run before it starts: boundaries, steps, seconds, learning rates.

The time of a step is piecewise constant (it grows when depth recurrence starts), so the run's clock is a short list of
segments, and the step at which anything keyed on progress happens is found by bisection on the very predicates that
the training loop asks. Nothing here trains; a step's time is given, or measured by `trainer.plan.dry_run`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from trainer.config import Recipe
from trainer.model.architecture import ArchitectureSettings
from trainer.optim.settings import OptimSettings
from trainer.optim.tensor_groups import freeze_moments
from trainer.run.phases import PhaseTracker, Reached, boundaries
from trainer.run.reserve import Reserve, estimate_reserve
from trainer.schedule.functions import active_loops_at, lr_multiplier, progress, warmup_end, weight_decay_multiplier
from trainer.schedule.stages import Stage, stage_at
from trainer.schedule.step_times import StepTimes


@dataclass(frozen=True)
class Segment:
    """A stretch of steps that take the same time."""

    first_step: int
    first_second: float
    step_seconds: float
    active_loops: int
    stage: Stage

    def second(self, step: int) -> float:
        """Return the training seconds when `step` steps are done."""
        return self.first_second + (step - self.first_step) * self.step_seconds


@dataclass(frozen=True)
class RunClock:
    """The predicted clock of a whole run of `end_step` steps."""

    recipe: Recipe
    segments: tuple[Segment, ...]
    end_step: int
    reserve_seconds: float = 0.0  # of the cap, not trained in

    def segment(self, step: int) -> Segment:
        """Return the segment that step `step` (counted from 0) lies in."""
        return next(segment for segment in reversed(self.segments) if segment.first_step <= step)

    def second(self, step: int) -> float:
        """Return the training seconds when `step` steps are done: the end of a segment is the start of the next."""
        return self.segment(step).second(step)

    def spans(self) -> list[tuple[Segment, int]]:
        """Return each segment and the step at which it ends."""
        ends = [*(segment.first_step for segment in self.segments[1:]), self.end_step]
        return list(zip(self.segments, ends, strict=True))

    def tokens(self, step: int) -> int:
        """Return the tokens seen when `step` steps are done."""
        return sum(max(0, min(step, end) - each.first_step) * each.stage.batch_tokens for each, end in self.spans())

    def progress(self, step: int) -> float:
        """Return the progress when `step` steps are done."""
        return progress(self.recipe.schedule, step, self.second(step), self.reserve_seconds)

    def first_step(self, reached: Reached) -> int | None:
        """Return the first step before which a boundary is reached, or None if it never is."""

        def test(step: int) -> bool:
            return reached(step, self.progress(step))

        if test(0):
            return 0
        return bisect_left(range(self.end_step), True, key=test) if test(self.end_step - 1) else None


def predict_clock(recipe: Recipe, times: StepTimes, reserve_seconds: float = 0.0) -> RunClock:
    """Follow the run from segment to segment until its progress is 1."""
    schedule, num_loops = recipe.schedule, recipe.model.max_active_loops
    segments: list[Segment] = []
    step, second = 0, 0.0
    while (at := progress(schedule, step, second, reserve_seconds)) < 1.0:
        loops = active_loops_at(schedule, num_loops, at)
        stage = stage_at(recipe.stages, at)
        share = stage.batch_tokens / recipe.data.batch_tokens  # a step's time is in proportion to its tokens
        segment = Segment(step, second, times.of(recipe.model, loops) * share, loops, stage)
        segments.append(segment)
        step = _first_step_after(segment, recipe, reserve_seconds)
        second = segment.second(step)
    return RunClock(recipe, tuple(segments), step, reserve_seconds)


def _first_step_after(segment: Segment, recipe: Recipe, reserve_seconds: float) -> int:
    """Return the step before which the segment's loops or stage change or the run ends."""

    def over(step: int) -> bool:
        at = progress(recipe.schedule, step, segment.second(step), reserve_seconds)
        loops = active_loops_at(recipe.schedule, recipe.model.max_active_loops, at)
        return at >= 1.0 or loops != segment.active_loops or stage_at(recipe.stages, at) != segment.stage

    span = 1
    while not over(segment.first_step + span):
        span *= 2
    return segment.first_step + bisect_left(range(span), True, key=lambda steps: over(segment.first_step + steps))


@dataclass(frozen=True)
class Boundary:
    """A moment of the run, with the settings of the step that starts there."""

    phase: str
    step: int
    second: float
    progress: float
    lr_multiplier: float
    lr: dict[str, float]  # group → learning rate
    weight_decay_multiplier: float
    momentum: float
    active_loops: int
    checkpoint: bool  # whether a folder is written


@dataclass(frozen=True)
class Timeline:
    """A run's boundaries in step order, and those that its end comes before."""

    recipe: Recipe
    times: StepTimes
    clock: RunClock
    boundaries: tuple[Boundary, ...]
    never: tuple[str, ...]
    reserve: Reserve | None  # None without a cap

    @property
    def num_checkpoints(self) -> int:
        """Number of folders that the run will write; boundaries of one step share one."""
        return len({boundary.step for boundary in self.boundaries if boundary.checkpoint})

    @property
    def num_periodic(self) -> int:
        """Largest number of periodic checkpoints: one that meets a boundary is not written."""
        settings, last = self.recipe.checkpoint, self.clock.end_step - 1  # the step that the last one can precede
        by_steps = last // settings.every_steps if settings.every_steps else 0
        return by_steps + (int(self.clock.second(last) / settings.every_seconds) if settings.every_seconds else 0)

    @property
    def seconds(self) -> float:
        return self.clock.second(self.clock.end_step)

    @property
    def ends_by(self) -> Literal["steps", "seconds"]:
        """The limit, of the two, that ends the run."""
        return "steps" if self.recipe.schedule.steps == self.clock.end_step else "seconds"


def moments(recipe: Recipe) -> dict[str, Reached]:
    """Return everything that happens at a moment of the run, whether or not a checkpoint is written there."""
    schedule, start = recipe.schedule, recipe.optim.swa_start
    named: dict[str, Reached] = {**boundaries(recipe), **PhaseTracker.from_recipe(recipe).pending}
    if warmup_end(schedule):
        named["lr_warmup_done"] = lambda step, at: at >= warmup_end(schedule)
    if (taper := schedule.weight_decay_taper_at) is not None:
        named["weight_decay_taper"] = lambda step, at: at >= taper
    for key in ("points", "weight_decay_points"):
        for share in {share for share, _ in getattr(schedule, key) if 0 < share < 1}:
            named[f"{key}@{share:g}"] = reaches(share)
    named |= {name: reaches(share) for name, (_, share) in freeze_moments(recipe.optim.groups).items()}
    for stage in schedule.stages:
        named[f"stage@{stage.at:g}"] = reaches(stage.at)
    if recipe.qat is not None:
        named["qat"] = reaches(recipe.qat.at)
    if start is not None:
        named["swa_start"] = lambda step, at: at >= start
    return named


def reaches(moment: float) -> Reached:
    """Return the test of having come to a progress."""
    return lambda step, at: at >= moment


def predict(recipe: Recipe, times: StepTimes, reserve: Reserve | None = None) -> Timeline:
    """Return the timeline of a recipe for given step times. A reserve that was not measured is estimated from them."""
    reserve = reserve or estimate_reserve(recipe, times)
    clock = predict_clock(recipe, times, reserve.seconds if reserve else 0.0)
    saved = PhaseTracker.from_recipe(recipe).pending
    steps = {name: clock.first_step(reached) for name, reached in moments(recipe).items()}
    in_order = [_boundary(clock, name, step, name in saved) for name, step in steps.items() if step is not None]
    in_order.append(_boundary(clock, "final", clock.end_step, True))
    in_order.sort(key=lambda boundary: boundary.step)
    never = tuple(name for name, step in steps.items() if step is None)
    return Timeline(recipe, times, clock, tuple(in_order), never, reserve)


def _boundary(clock: RunClock, phase: str, step: int, saved: bool) -> Boundary:
    """Return the boundary before step `step`, with the settings that hold there."""
    recipe, at = clock.recipe, clock.progress(step)
    multiplier = lr_multiplier(recipe.schedule, at)
    return Boundary(
        phase=phase,
        step=step,
        second=clock.second(step),
        progress=at,
        lr_multiplier=multiplier,
        lr={group: lr * multiplier for group, lr in group_peaks(recipe.optim, recipe.model).items()},
        weight_decay_multiplier=weight_decay_multiplier(recipe.schedule, at),
        momentum=recipe.optim.momentum_for(step),
        active_loops=active_loops_at(recipe.schedule, recipe.model.max_active_loops, at),
        checkpoint=saved,
    )


def group_peaks(optim: OptimSettings, model: ArchitectureSettings) -> dict[str, float]:
    """Return the peak learning rates of the groups that the model has: a tied model has no head of its own."""
    peaks = optim.peak_learning_rates()
    return {group: lr for group, lr in peaks.items() if group != "head" or not model.tie_embeddings}


def count_steps(clock: RunClock, after: Reached, every: int) -> int:
    """Return how many of the steps that start once `after` is reached end at a multiple of `every`."""
    first = clock.first_step(after)
    return 0 if first is None else clock.end_step // every - first // every

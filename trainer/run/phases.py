"""Phase boundaries: the moments of a run that become checkpoint folders.

Each boundary fires once, at the first step that reaches it; boundaries met by the same step share one folder, whose
phase names them all. `final` is not here: the loop writes it when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.config import Recipe
from trainer.schedule.functions import warmdown_start

PERIODIC = "periodic"  # the phase of a checkpoint that marks no boundary
INTERRUPTED = "interrupted"  # of one saved because a signal asked the run to stop
STOPPED_EARLY = "stopped_early"  # of one saved because the run was worse than another (see stopping.py)

Reached = Callable[[int, float], bool]  # (step, progress) → whether the boundary has come


def boundaries(recipe: Recipe) -> dict[str, Reached]:
    """Return every named boundary that this recipe's schedule has, `final` aside."""
    schedule, optim, num_loops = recipe.schedule, recipe.optim, recipe.model.max_active_loops
    named: dict[str, Reached] = {"init": lambda step, at: step == 0}
    if optim.momentum_warmup_steps:
        named["momentum_warmup_done"] = _at_step(optim.momentum_warmup_steps)
    if num_loops:
        named["loops_on"] = _at_progress(schedule.loops_at)
    if num_loops > 1 and schedule.all_loops_at is not None:
        named["all_loops_on"] = _at_progress(schedule.all_loops_at)
    if schedule.warmdown:
        named["warmdown_start"] = _at_progress(warmdown_start(schedule))
    return named


def fraction_name(fraction: float) -> str:
    """Return the phase name of a share of the run: 0.05 → frac05, 0.7 → frac70, 0.125 → frac12.5."""
    percent = f"{100 * fraction:.6g}"
    return f"frac0{percent}" if fraction < 0.1 else f"frac{percent}"


@dataclass
class PhaseTracker:
    """The boundaries that are still ahead. The loop calls `due` before every optimizer step."""

    pending: dict[str, Reached] = field(default_factory=dict)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PhaseTracker:
        """Return the boundaries that the recipe wants as checkpoints."""
        settings = recipe.checkpoint
        named = boundaries(recipe)
        pending: dict[str, Reached] = {name: named[name] for name in named if name in settings.phases}
        for fraction in settings.fractions:
            pending[fraction_name(fraction)] = _at_progress(fraction)
        for wanted in settings.steps:
            pending[f"step{wanted}"] = _at_step(wanted)
        return cls(pending)

    def due(self, step: int, at: float) -> str | None:
        """Return the names, joined by +, of the boundaries reached by `step` steps and progress `at`, or None."""
        reached = [name for name, test in self.pending.items() if test(step, at)]
        for name in reached:
            del self.pending[name]
        return "+".join(reached) or None

    def skip_past(self, step: int, at: float) -> None:
        """Forget boundaries that a resumed run has already passed."""
        self.due(step, at)


@dataclass
class Periodic:
    """Checkpoints every n steps or training seconds, between the boundaries. The loop calls `due` before every step."""

    every_steps: int | None
    every_seconds: float | None
    passed: tuple[int, int] = (0, 0)  # multiples of each that are behind

    def due(self, step: int, train_seconds: float) -> bool:
        """Return whether a multiple of either period was passed since the last call."""
        before, self.passed = self.passed, self._passed_by(step, train_seconds)
        return any(now > then for now, then in zip(self.passed, before, strict=True))

    def skip_past(self, step: int, train_seconds: float) -> None:
        """Forget periods that a resumed run has already passed."""
        self.passed = self._passed_by(step, train_seconds)

    def _passed_by(self, step: int, train_seconds: float) -> tuple[int, int]:
        by_steps = step // self.every_steps if self.every_steps else 0
        return by_steps, int(train_seconds / self.every_seconds) if self.every_seconds else 0


def _at_progress(fraction: float) -> Reached:
    return lambda step, at: at >= fraction


def _at_step(wanted: int) -> Reached:
    return lambda step, at: step >= wanted

"""Phase boundaries: the moments of a run that become checkpoint folders.

Each boundary fires once, at the first step that reaches it; boundaries met by the same step share one folder, whose
phase names them all. `final` is not here: the loop writes it when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.config import Recipe
from trainer.schedule import warmdown_start

Reached = Callable[[int, float], bool]  # (step, progress) → whether the boundary has come


@dataclass
class PhaseTracker:
    """Which boundaries are still ahead. `due` is asked before every optimizer step."""

    pending: dict[str, Reached] = field(default_factory=dict)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PhaseTracker:
        schedule, settings = recipe.schedule, recipe.checkpoint
        named: dict[str, Reached] = {"init": lambda step, at: step == 0}
        if recipe.optim.momentum_warmup_steps:
            named["momentum_warmup_done"] = lambda step, at: step >= recipe.optim.momentum_warmup_steps
        if recipe.model.num_loops:
            named["loops_on"] = lambda step, at: at >= schedule.loops_at
        if schedule.warmdown:
            named["warmdown_start"] = lambda step, at: at >= warmdown_start(schedule)
        pending: dict[str, Reached] = {n: reached for n, reached in named.items() if n in settings.phases}
        for fraction in settings.fractions:
            pending[f"frac{round(100 * fraction):02d}"] = _at_progress(fraction)
        for wanted in settings.steps:
            pending[f"step{wanted}"] = _at_step(wanted)
        return cls(pending)

    def due(self, step: int, at: float) -> str | None:
        """The phase name if a boundary is reached by `step` steps and progress `at`, joined by + if several are."""
        reached = [name for name, test in self.pending.items() if test(step, at)]
        for name in reached:
            del self.pending[name]
        return "+".join(reached) or None

    def skip_past(self, step: int, at: float) -> None:
        """Forget boundaries that a resumed run has already passed."""
        self.due(step, at)


def _at_progress(fraction: float) -> Reached:
    return lambda step, at: at >= fraction


def _at_step(wanted: int) -> Reached:
    return lambda step, at: step >= wanted

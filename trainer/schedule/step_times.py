"""Duration of an optimizer step: piecewise constant, longer once depth recurrence has started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.model.architecture import ArchitectureSettings
from trainer.model.visits import visit_list


def num_visits(model: ArchitectureSettings, active_loops: int) -> int:
    """Return how many blocks one forward pass visits."""
    return len(visit_list(model, active_loops))


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one optimizer step without loops and with all of them."""

    plain: float
    looped: float
    origin: Literal["given", "measured"]

    @classmethod
    def given(cls, model: ArchitectureSettings, plain: float, looped: float | None = None) -> StepTimes:
        """Return given times; an unknown time of a looped step is assumed to be in proportion to its block visits."""
        visits = num_visits(model, model.max_active_loops) / num_visits(model, 0)
        return cls(plain, plain * visits if looped is None else looped, "given")

    def of(self, model: ArchitectureSettings, active_loops: int) -> float:
        """Return the seconds of a step with this many active loops, linear in block visits between the two times."""
        if not active_loops:
            return self.plain
        none, some, most = (num_visits(model, loops) for loops in (0, active_loops, model.max_active_loops))
        return self.plain + (self.looped - self.plain) * (some - none) / ((most - none) or 1)

"""How long an optimizer step takes: piecewise constant, longer once depth recurrence has started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.architecture import ArchitectureSettings, visit_list


def num_visits(model: ArchitectureSettings, active_loops: int) -> int:
    """How many blocks one forward pass visits."""
    return len(visit_list(model, active_loops))


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one optimizer step without loops and with all of them."""

    plain: float
    looped: float
    origin: Literal["given", "measured"]

    @classmethod
    def given(cls, model: ArchitectureSettings, plain: float, looped: float | None = None) -> StepTimes:
        """From a known time; a looped step that is not known is assumed to cost what its visits say."""
        visits = num_visits(model, model.max_active_loops) / num_visits(model, 0)
        return cls(plain, plain * visits if looped is None else looped, "given")

    def of(self, model: ArchitectureSettings, active_loops: int) -> float:
        """Seconds of a step with this many active loops, linear in the number of visits between the two known times."""
        if not active_loops:
            return self.plain
        none, some, most = (num_visits(model, loops) for loops in (0, active_loops, model.max_active_loops))
        return self.plain + (self.looped - self.plain) * (some - none) / ((most - none) or 1)

"""Shapes of the learning rate over a run: one function and one row of SCHEDULES each.

A shape says how the learning rate falls from its peak, as a function of progress in [0, 1]. The rise before the peak is
the same for all: linear over `lr_warmup` of the run, or over a share that the shape fixes. Results are multiples of the
peak between `lr_floor` and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from trainer.tables import name_in, pick, read_keys

TIDAL_WARMUP = (3 - math.sqrt(5)) / 2  # 1 - 1/φ = 0.381966…, φ the golden ratio


def linear(at: float, peak: float, warmdown: float, lr_floor: float) -> float:
    """1, then over the last `warmdown` of the run linearly towards 0, stopped at the floor."""
    if warmdown == 0 or at < 1.0 - warmdown:
        return 1.0
    return max((1.0 - at) / warmdown, lr_floor)


def wsd(at: float, peak: float, warmdown: float, lr_floor: float) -> float:
    """Warm-up, stable, decay: like `linear`, but the slope reaches the floor exactly at the end."""
    if warmdown == 0 or at < 1.0 - warmdown:
        return 1.0
    return _above_floor((1.0 - at) / warmdown, lr_floor)


def cosine(at: float, peak: float, lr_floor: float) -> float:
    """Half a cosine from the peak to the floor at the end."""
    return _above_floor(0.5 * (1.0 + math.cos(math.pi * (at - peak) / (1.0 - peak))), lr_floor)


def _above_floor(share: float, lr_floor: float) -> float:
    """Stretch a share in [0, 1] to [lr_floor, 1]."""
    return lr_floor + (1.0 - lr_floor) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class LRSchedule:
    """A row of SCHEDULES."""

    function: Callable[..., float]  # of progress, the peak's progress and the settings that it reads: the multiplier
    reads: tuple[str, ...]  # keys of the schedule settings, passed by name
    source: str  # paper or pull request
    fixed_warmup: float | None = None  # the rise's share of the run where the shape fixes it; None = lr_warmup

    def after_peak(self, settings: object, at: float, peak: float) -> float:
        """Return the multiplier at progress `at`, at or after the peak, under the given schedule settings."""
        return self.function(at, peak, **read_keys(settings, self.reads))


SCHEDULES: dict[str, LRSchedule] = {
    "linear": LRSchedule(linear, ("warmdown", "lr_floor"), "the record line, openai/parameter-golf #1855"),
    "cosine": LRSchedule(cosine, ("lr_floor",), "Loshchilov & Hutter 2017, arXiv:1608.03983"),
    "tidal": LRSchedule(
        cosine, ("lr_floor",), "cosine after a rise over 1 - 1/φ of the run (golden ratio)", fixed_warmup=TIDAL_WARMUP
    ),
    "wsd": LRSchedule(wsd, ("warmdown", "lr_floor"), "Hu et al. 2024 (MiniCPM), arXiv:2404.06395"),
}

ScheduleName = Annotated[str, name_in(SCHEDULES, "schedule shape")]


def schedule_of(name: str) -> LRSchedule:
    """Return the row of a shape. Raises SettingsError listing the names that there are."""
    return pick(SCHEDULES, name, "schedule shape")

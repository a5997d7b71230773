"""The clock of `schedule.seconds`: wall seconds of optimizer steps, or processor seconds of everything a run does.

Wall seconds are what the challenge counts. On a machine that is shared they depend on who else computes, and with them
how far a run comes. Processor seconds (user and system time of all threads and of waited children) do not: a run of so
many ends where it would end on an idle machine, but for what caches and hyper-threads share. They count the whole
process from the start of the command (loading, checkpoints and scores too), so that a limit in them is one on all that
was computed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pgolf_post.errors import SettingsError

if TYPE_CHECKING:
    import torch

ClockName = Literal["wall", "processor"]


def processor_seconds() -> float:
    """Return processor seconds of this process so far, all threads and waited children included."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


TIMERS: dict[ClockName, Callable[[], float]] = {"wall": time.perf_counter, "processor": processor_seconds}


@dataclass
class ScheduleClock:
    """Seconds that a run has spent of `schedule.seconds`."""

    name: ClockName = "wall"
    began: float = field(default_factory=processor_seconds)  # of this process, when the run began
    earlier: float = 0.0  # seconds of the processes that this one resumes

    def after_step(self, before: float, step_seconds: float) -> float:
        """Return the seconds spent when a step has ended that took so many wall seconds after `before`."""
        return before + step_seconds if self.name == "wall" else self.earlier + processor_seconds() - self.began


def require_countable(clock: ClockName, device: torch.device, world_size: int) -> None:
    """Raise SettingsError where processor seconds would leave out what computes: a GPU, or other processes."""
    if clock == "processor" and (device.type != "cpu" or world_size > 1):
        where = f"{world_size} processes" if world_size > 1 else f"device {device.type}"
        raise SettingsError(
            f'schedule.clock = "processor" counts one process on a CPU, and this run has {where}',
            hint="leave schedule.clock out: it counts wall seconds",
        )

"""Seconds of a run per phase, and which of them count against the cap.

The challenge counts what reads training data; the rest (loading, compiling, scoring on validation text, writing) is
excluded by convention and still paid for. So every second of a run goes into one phase: an inner phase's seconds are
not the outer one's too, and what no phase claims is "other". Training seconds are the schedule's own clock. The times
travel in every checkpoint's meta.json under the key "ledger". A resumed run adds to them. ledger.json has them when the
run ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pgolf_post.base.progress import print_table
from pgolf_post.base.storage import FREE_SPACE, atomic_file, write_json
from pgolf_post.errors import PgolfError

TrainingPhase = Literal["load", "warm_up", "train_plain", "train_looped", "scoring", "checkpoint", "final"]
READS_TRAINING_DATA: frozenset[TrainingPhase] = frozenset({"train_plain", "train_looped"})
MEANING: dict[TrainingPhase, str] = {
    "load": "data folder, model and optimizer",
    "warm_up": "compiling and measuring on synthetic tokens",
    "train_plain": "optimizer steps without loops",
    "train_looped": "optimizer steps with loops on",
    "scoring": "recorded metrics, on validation text",
    "checkpoint": "training held up by checkpoints: copying, writing, waiting",
    "final": "the final checkpoint and all that was still to be written",
}
PHASE_TIMES_FILE = "ledger.json"


@dataclass
class _OpenPhase:
    """A phase that is under way."""

    name: TrainingPhase
    started: float
    inner: float = 0.0  # seconds that phases inside it have claimed


class PhaseTimes:
    """Seconds of this run by phase, earlier processes of a resumed run included."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[TrainingPhase, float] = dict.fromkeys(get_args(TrainingPhase), 0.0)
        self.earlier_seconds = 0.0  # wall time of the processes that this one resumes
        self._open: list[_OpenPhase] = []

    @contextmanager
    def phase(self, name: TrainingPhase) -> Iterator[None]:
        """Count the block's seconds as phase `name`, those of phases inside it left out, even if the block fails."""
        opened = _OpenPhase(name, time.perf_counter())
        self._open.append(opened)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - opened.started
            self._open.pop()
            self.seconds[name] += elapsed - opened.inner
            self._claim(elapsed)

    def add(self, name: TrainingPhase, seconds: float) -> None:
        """Add seconds that another clock has measured just now."""
        self.seconds[name] += seconds
        self._claim(seconds)

    def _claim(self, seconds: float) -> None:
        if self._open:
            self._open[-1].inner += seconds

    def so_far(self) -> dict[TrainingPhase, float]:
        """Return seconds by phase, those of open phases up to now."""
        seconds, inside, now = dict(self.seconds), 0.0, time.perf_counter()
        for opened in reversed(self._open):
            elapsed = now - opened.started
            seconds[opened.name] += elapsed - opened.inner - inside
            inside = elapsed
        return seconds

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Add the times of a checkpoint, as `as_facts` returned them, to those of this process."""
        for name in self.seconds:
            self.seconds[name] += float(facts["phases"].get(name, {}).get("seconds", 0.0))
        self.earlier_seconds += float(facts["wall_seconds"])

    def as_facts(self, cap_seconds: float | None = None) -> dict[str, Any]:
        """Return, for meta.json, the seconds of each phase, of all that read training data, of the cap, and in all."""
        wall = self.earlier_seconds + time.perf_counter() - self.started
        seconds = self.so_far()
        phases = {
            name: {"seconds": round(spent, 3), "reads_training_data": name in READS_TRAINING_DATA}
            for name, spent in seconds.items()
        }
        return {
            "phases": phases,
            "training_data_seconds": round(sum(seconds[name] for name in READS_TRAINING_DATA), 3),
            "cap_seconds": cap_seconds,
            "other_seconds": round(wall - sum(seconds.values()), 3),
            "wall_seconds": round(wall, 3),
        }


def show_phase_times(facts: Mapping[str, Any]) -> None:
    """Show phase times as a table, phases that took no time left out."""
    rows: list[tuple[str, ...]] = [
        (name, f"{facts['phases'][name]['seconds']:,.1f}", "yes" if name in READS_TRAINING_DATA else "", meaning)
        for name, meaning in MEANING.items()
        if facts["phases"][name]["seconds"]
    ]
    rows.append(("other", f"{facts['other_seconds']:,.1f}", "", "logging and everything else"))
    rows.append(("in all", f"{facts['wall_seconds']:,.1f}", "", ""))
    cap, counted = facts["cap_seconds"], facts["training_data_seconds"]
    room = f"cap {cap:,.1f} s: {abs(cap - counted):,.1f} s {'left' if counted <= cap else 'OVER'}" if cap else "no cap"
    rows.append(("counted", f"{counted:,.1f}", "yes", room))
    print_table("where the time went", ("phase", "seconds", "reads training data", ""), rows)


def write_phase_times(path: Path, facts: Mapping[str, Any]) -> None:
    """Write phase times as a JSON file. Raises PgolfError if it cannot be written."""
    try:
        with atomic_file(path) as building:
            write_json(building, facts)
    except (OSError, PgolfError) as error:
        raise PgolfError(f"the phase times: {error}", hint=getattr(error, "hint", None) or FREE_SPACE) from error

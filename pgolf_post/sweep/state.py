"""A sweep as it stands: which trials are done, which are ready, and which an axis that only gets worse has stopped."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from pgolf_post.ledger import Row
from pgolf_post.sweep.expand import Trial
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.settings import SweepSpec


@dataclass
class State:
    """A sweep as it stands: what is asked for, and the rows there are."""

    spec: SweepSpec
    listed: list[Listed]
    rows: dict[str, Row]

    @property
    def open(self) -> list[Listed]:
        return [one for one in self.listed if one.id not in self.rows]

    def control(self, listed: Listed) -> tuple[Trial, Row | None]:
        """Return the control that a trial is compared with, and its row."""
        if listed.trial.role == "control":
            return listed.trial, None
        trial = next(one.trial for one in self.listed if one.id == listed.control_id)
        return trial, self.rows.get(listed.control_id)

    def noise(self, listed: Listed) -> list[Listed]:
        return [one for one in self.listed if one.trial.role == "noise" and one.control_id == listed.control_id]

    def before(self, listed: Listed) -> list[Listed]:
        """Return the trials that come before one on its axis."""
        trial = listed.trial
        others = [o for o in self.listed if trial.axis and o.trial.axis == trial.axis and o.trial.group == trial.group]
        fixed = _apart(trial)
        return [o for o in others[: others.index(listed)] if _apart(o.trial) == fixed] if listed in others else []

    def is_ready(self, listed: Listed) -> bool:
        """Whether everything that a trial's row refers to is there."""
        role = listed.trial.role
        if role == "control":
            return True
        needed = [listed.control_id]
        if role == "trial":
            needed += [one.id for one in self.noise(listed)]
            if self.spec.gates.stop_if_monotone_worse:
                needed += [one.id for one in self.before(listed)]
        return all(one in self.rows for one in needed)

    def is_stopped(self, listed: Listed) -> bool:
        """Whether the trials before it on its axis were each worse than the one before them."""
        wanted, stage = self.spec.gates.stop_if_monotone_worse, self.spec.deciding_stage
        if not wanted or stage is None or listed.trial.role != "trial":
            return False
        earlier = [self.rows[one.id].result for one in self.before(listed)]
        if any("stopped" in result for result in earlier):
            return True
        values = [result[stage].get("difference_bpb", 0.0) for result in earlier if stage in result]
        floor = max((result.get("noise_floor_bpb", 0.0) for result in earlier), default=0.0)
        last = values[-wanted - 1 :]
        rising = all(second > first for first, second in itertools.pairwise(last))
        return len(last) == wanted + 1 and rising and last[-1] - last[0] > floor


def _apart(trial: Trial) -> list[tuple[str, Any]]:
    """Return the changes that fix the line which a trial's axis runs along."""
    return [(key, value) for key, value in trial.changes if key != trial.axis]

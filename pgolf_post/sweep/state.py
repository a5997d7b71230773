"""A sweep as it stands: which trials are done, which are ready, and which an axis that only gets worse has stopped."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any

from pgolf_post.ledger import Row
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.outcomes import outcome_of
from pgolf_post.sweep.standing import Standing
from pgolf_post.sweep.train_stage import Halving
from pgolf_post.sweep.trials import Trial


class State(Standing):
    """A sweep as it stands, and what is to be run next."""

    @cached_property
    def _by_id(self) -> dict[str, Listed]:
        return {one.id: one for one in self.listed}

    @cached_property
    def _noise(self) -> dict[str, list[Listed]]:
        """Noise repeats by their control."""
        found: dict[str, list[Listed]] = {}
        for one in self.listed:
            if one.trial.role == "noise":
                found.setdefault(one.control_id, []).append(one)
        return found

    @cached_property
    def _runs(self) -> dict[int, list[Listed]]:
        """Runs of one seed by their rung."""
        found: dict[int, list[Listed]] = {}
        for one in self.listed:
            if one.trial.seed is not None:
                found.setdefault(one.trial.rung, []).append(one)
        return found

    def control(self, listed: Listed) -> tuple[Trial, Row | None]:
        """Return the control that a trial is compared with, and its row."""
        if listed.trial.role == "control":
            return listed.trial, None
        trial = self._by_id[listed.control_id].trial
        return trial, self.rows.get(listed.control_id)

    def noise(self, listed: Listed) -> list[Listed]:
        return self._noise.get(listed.control_id, [])

    def compared(self, listed: Listed) -> dict[str, Row]:
        """Return the rows that a trial is compared with: its control's and the noise repeats'."""
        ids = [listed.control_id, *(one.id for one in self.noise(listed))]
        return {one: self.rows[one] for one in ids if one in self.rows}

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
            needed += self._waits_for(listed.trial)
        return all(one in self.rows for one in needed)

    def _waits_for(self, trial: Trial) -> list[str]:
        """Return the runs that decide whether a run is worth making: of the rung before, and of its trial's seeds."""
        if trial.seed is None:
            return []
        before = [one.id for one in self._runs.get(trial.rung - 1, [])]
        return before + [id for one in self._earlier_seeds(trial) for id in (one.id, one.control_id)]

    def _earlier_seeds(self, trial: Trial) -> list[Listed]:
        """Return the runs of a trial before this one, where `gates.kill` may end it after them."""
        if self.spec.gates.kill is None or trial.seed is None:
            return []
        runs = [one for one in self._runs[trial.rung] if one.trial.of == trial.of]
        return runs[: next(place for place, one in enumerate(runs) if one.trial.seed == trial.seed)]

    def why_stopped(self, listed: Listed) -> str | None:
        """Return why a trial is not run, by the rows of those before it; None where it is."""
        trial = listed.trial
        if trial.role != "trial":
            return None
        if self._is_left(listed):
            return "skipped by stop_if_monotone_worse"
        earlier = self._earlier_seeds(trial)
        seen = outcome_of(self, earlier) if earlier else None
        if seen is not None and seen.decision == "KILL" and seen.difference is not None:
            return f"KILL after {seen.difference.seeds} of its seeds: {seen.why}"
        if self.spec.halving is not None and trial.rung > 0:
            return self._why_not_kept(trial, self.spec.halving)
        return None

    def _why_not_kept(self, trial: Trial, halving: Halving) -> str | None:
        """Return a trial's place among those of the rung before, if that many did not go on."""
        runs = [one for one in self._runs[trial.rung - 1] if one.trial.role == "trial"]
        names = dict.fromkeys(one.trial.of for one in runs)
        found = [outcome_of(self, [one for one in runs if one.trial.of == name]) for name in names]
        ran = [one for one in found if one is not None and one.difference is not None and one.decision != "KILL"]
        ran.sort(key=lambda one: (one.difference.mean if one.difference else 0.0, one.name))
        place = next((number for number, one in enumerate(ran, 1) if one.name == trial.of), None)
        if place is None:
            return f"not among the trials that are left after rung {trial.rung}"
        most = halving.kept(sum(one is not None for one in found))
        return None if place <= most else f"place {place} of {len(ran)} in rung {trial.rung}; {most} go on"

    def _is_left(self, listed: Listed) -> bool:
        """Whether the trials before it on its axis were each worse than the one before them."""
        wanted, stage = self.spec.gates.stop_if_monotone_worse, self.spec.deciding_stage
        if not wanted or stage is None:
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

"""Outcomes of trials over all their runs: mean ± deviation of their seeds, the difference from the control, a decision.

Outcomes are worked out from the rows each time, so a gate that is changed decides anew without running anything. A
trial of one set of weights (no training) is decided on by its interval over the text, where gates are given.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pgolf_post.ledger import Row, Verdict
from pgolf_post.settings import canonical_json
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.seed_statistics import Decision, SeedDifference, decide, more_seeds, seed_difference
from pgolf_post.sweep.standing import Standing

HEADER = ("trial", "seeds", "bpb", "Δ control", "interval", "decision", "rests on")
VERDICT_OF: dict[Decision, Verdict] = {"PROMOTE": "positive", "KILL": "negative", "UNDECIDED": "neutral"}


@dataclass(frozen=True)
class Outcome:
    """A trial over its runs. The control has no difference and no decision."""

    name: str
    rung: int
    bpb: dict[int, float]  # by seed; by 0 where a trial has no seeds
    planned: int  # runs that were asked for
    rows: tuple[Row, ...]
    control: tuple[Row, ...] = ()
    difference: SeedDifference | None = None
    decision: Decision | None = None
    why: str = ""
    more: int | None = None  # seeds that would decide

    @property
    def mean(self) -> float:
        return statistics.fmean(self.bpb.values())

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.bpb.values()) if len(self.bpb) > 1 else None

    def facts(self) -> dict[str, Any]:
        """Return the outcome as JSON."""
        told = {"name": self.name, "rung": self.rung, "runs": self.planned, "bpb_by_seed": self.bpb}
        told |= {"bpb": self.mean, "sd_bpb": self.sd}
        if self.difference is None:
            return told
        return {**told, **self.difference.facts(), "decision": self.decision, "why": self.why, "more_seeds": self.more}

    def cells(self) -> tuple[str, ...]:
        """Return the outcome for people."""
        spread = f" ± {self.sd:.5f}" if self.sd is not None else ""
        shown = (self.name, f"{len(self.bpb)} of {self.planned}", f"{self.mean:.5f}{spread}")
        if self.difference is None:
            return (*shown, "", "", "", "")
        seen, why = self.difference, self.why
        if self.decision == "UNDECIDED":
            why += f"; {self.more} more would decide" if self.more else ""
            why += "" if self.more or math.isnan(seen.sd) else "; no number of seeds would decide"
            why += "; a second seed would tell the spread" if math.isnan(seen.sd) else ""
        interval = f"{seen.low:+.5f} … {seen.high:+.5f} ({seen.kind})" if math.isfinite(seen.high) else ""
        return (*shown, f"{seen.mean:+.5f}", interval, self.decision or "", why)


def outcomes(state: Standing) -> list[Outcome]:
    """Return the outcomes of trials with seeds, and of all where gates decide; the control's before its trials'."""
    if state.spec.deciding_stage is None:
        return []
    return [found for members in _by_trial(state.listed) if (found := outcome_of(state, members)) is not None]


def _by_trial(listed: Iterable[Listed]) -> list[list[Listed]]:
    """Return runs by the trial and rung that they are of."""
    found: dict[tuple[str, int], list[Listed]] = {}
    for one in listed:
        if one.trial.role in ("control", "trial"):
            found.setdefault((one.trial.of or one.trial.name, one.trial.rung), []).append(one)
    return list(found.values())


def outcome_of(state: Standing, members: Sequence[Listed]) -> Outcome | None:
    """Return a trial's outcome by the rows there are; None without a score, or where nothing is to be decided."""
    first = members[0].trial
    gates, level = state.spec.gates, state.spec.stages.level
    bpb, rows = _scores(state, members)
    if not bpb or (first.seed is None and not gates.decide):
        return None
    named: dict[str, Any] = {"name": first.of or first.name, "rung": first.rung, "planned": len(members)}
    if first.role == "control":
        return Outcome(bpb=bpb, rows=rows, **named)
    groups = {member.control_id for member in members}
    control_of = next(one.trial for one in state.listed if one.id in groups)
    same = [
        one
        for one in state.listed
        if one.trial.role == "control"
        and (one.trial.of, one.trial.rung) == (control_of.of, control_of.rung)
        and (one.id in groups or one.trial.of)
    ]
    control, control_rows = _scores(state, same)
    if not control:
        return None
    seen = _difference(state, members, bpb, control, control_of.seed is None, level)
    decision, why = decide(gates, seen.mean, seen.low, seen.high)
    more = more_seeds(gates, seen, level) if decision == "UNDECIDED" and first.seed is not None else None
    return Outcome(
        bpb=bpb, rows=rows, control=control_rows, difference=seen, decision=decision, why=why, more=more, **named
    )


def _difference(
    state: Standing,
    members: Sequence[Listed],
    bpb: dict[int, float],
    control: dict[int, float],
    is_one: bool,
    level: float,
) -> SeedDifference:
    """Return a trial's difference: over seeds; of one set of weights, the row's own, which is paired over the text."""
    trial = members[0].trial
    if trial.seed is not None or trial.settings.train is not None:
        return seed_difference(bpb, control[0] if is_one else control, level)
    score = state.rows[members[0].id].result[str(state.spec.deciding_stage)]
    low, high = (math.inf if score.get(key) is None else score[key] for key in ("low_bpb", "high_bpb"))
    return SeedDifference(score["difference_bpb"], -low if low == math.inf else low, high, math.nan, 1, "paired")


def _scores(state: Standing, members: Iterable[Listed]) -> tuple[dict[int, float], tuple[Row, ...]]:
    """Return bpb by seed of the runs that have a score, and their rows."""
    stage = str(state.spec.deciding_stage)
    there = [(one, state.rows[one.id]) for one in members if one.id in state.rows]
    scored = [(one, row) for one, row in there if stage in row.result]
    return {one.trial.seed or 0: float(row.result[stage]["bpb"]) for one, row in scored}, tuple(
        row for _, row in scored
    )


def outcome_rows(state: Standing, sweep: str) -> list[Row]:
    """Return the decisions on trials all of whose runs have a row, for the ledger: a comparison each."""
    done = {name for name in _names(state) if name not in {one.trial.of for one in state.open}}
    return [
        _row(found, state, sweep)
        for found in outcomes(state)
        if found.difference is not None and found.name in done and len(found.control) > 0
    ]


def _names(state: Standing) -> set[str]:
    return {one.trial.of for one in state.listed if one.trial.of}


def _row(found: Outcome, state: Standing, sweep: str) -> Row:
    gates = state.spec.gates.model_dump(mode="json", include={"accept", "kill", "minimum_effect"})
    settings = {"candidate": f"{sweep}/{found.name}", "control": f"{sweep}/control", "rung": found.rung, "gates": gates}
    settings["protocol"] = state.spec.deciding_stage
    parents = tuple(row.id for row in (*found.rows, *found.control))
    row_id = hashlib.sha256(canonical_json(["outcome", parents, settings])).hexdigest()
    result = {key: value for key, value in found.facts().items() if key != "bpb_by_seed"}
    result["bpb_by_seed"] = {str(seed): bpb for seed, bpb in found.bpb.items()}
    told = " ".join(found.cells()[-2:])
    name = f"{sweep}/{found.name} against control"
    assert found.decision is not None
    return Row(
        "comparison", row_id, parents, name, sweep, settings, result=result,
        verdict=VERDICT_OF[found.decision], conclusion=told,
    )  # fmt: skip

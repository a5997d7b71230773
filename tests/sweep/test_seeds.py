"""Verdicts over seeds: intervals by the textbook, gates at their edges, runs by seed and rung, halving by the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pgolf_post.errors import SettingsError
from pgolf_post.ledger import Row
from pgolf_post.sweep.expand import expand, read_spec
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.outcomes import outcome_rows, outcomes
from pgolf_post.sweep.seed_statistics import decide, more_seeds, seed_difference
from pgolf_post.sweep.settings import Gates, SweepSpec
from pgolf_post.sweep.state import State
from pgolf_post.sweep.table import markdown
from tests.sweep.conftest import STAGES, Lab

SEEDED = """question = "wider?"
train = { recipe = "r.toml", seeds = [1, 2, 3] }
baselines = []
[[trials]]
name = "wide"
train.set = ["model.mlp_mult=3"]
[[trials]]
name = "narrow"
train.set = ["model.mlp_mult=1"]
"""
HALVING = SEEDED + "[halving]\nrungs = [{ steps = 10, seeds = 1 }, { steps = 40, seeds = 2 }]\n"


def spec_of(folder: Path, text: str) -> SweepSpec:
    (folder / "s.toml").write_text(f"{text}\n{STAGES}", encoding="utf-8")
    return read_spec(folder / "s.toml")


def state_of(spec: SweepSpec) -> State:
    """The spec's trials under their names as ids, none of them run."""
    trials = expand(spec, lambda _: 1)
    controls = {trial.group: trial.name for trial in trials if trial.role == "control"}
    return State(spec, [Listed(trial, trial.name, controls[trial.group]) for trial in trials], {})


def run(state: State, **bpb: float) -> None:
    """Give every run of a trial its score: the trial's bpb and what its seed adds."""
    for one in state.listed:
        name = one.trial.of or one.trial.name
        if name in bpb and one.id not in state.rows:
            value = bpb[name] + 0.01 * (one.trial.seed or 0)
            state.rows[one.id] = Row("trial", one.id, name=one.trial.name, result={"screen": {"bpb": value}})


def test_intervals_are_the_textbooks() -> None:
    ours, theirs = {1: 1.30, 2: 1.33, 3: 1.29, 4: 1.31}, {1: 1.32, 2: 1.34, 3: 1.32, 4: 1.31}
    paired = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.9)
    seen = seed_difference(ours, theirs, 0.9)
    assert (seen.kind, seen.low, seen.high) == ("paired", pytest.approx(paired.low), pytest.approx(paired.high))
    others = {seed + 10: bpb for seed, bpb in theirs.items() if seed < 4}
    welch = stats.ttest_ind(list(ours.values()), list(others.values()), equal_var=False).confidence_interval(0.9)
    seen = seed_difference(ours, others, 0.9)
    assert (seen.kind, seen.low, seen.high) == ("Welch", pytest.approx(welch.low), pytest.approx(welch.high))
    fixed = seed_difference(ours, 1.32, 0.9)
    one = stats.ttest_1samp(list(ours.values()), 1.32).confidence_interval(0.9)
    assert (fixed.low, fixed.high) == (pytest.approx(one.low - 1.32), pytest.approx(one.high - 1.32))
    assert seed_difference({1: 1.3}, {1: 1.4}, 0.9).high == math.inf


@pytest.mark.parametrize(
    ("gates", "difference", "half", "decision"),
    [
        ({}, -0.002, 0.001, "PROMOTE"),
        ({}, -0.002, 0.003, "UNDECIDED"),
        ({}, 0.002, 0.001, "KILL"),
        ({"accept": -0.0005}, -0.0006, 0.0001, "PROMOTE"),
        ({"accept": -0.0005}, -0.0004, 0.0001, "UNDECIDED"),
        ({"kill": 0.002}, 0.002, math.inf, "KILL"),
        ({"kill": 0.002}, 0.0019, math.inf, "UNDECIDED"),
        ({"minimum_effect": 0.001}, -0.0002, 0.0001, "KILL"),  # better, and not by enough to matter
        ({"minimum_effect": 0.001}, -0.0015, 0.0002, "PROMOTE"),
        ({}, 0.0, 0.0, "KILL"),  # the same numbers
    ],
)
def test_gates_decide(gates: dict[str, float], difference: float, half: float, decision: str) -> None:
    assert decide(Gates(**gates), difference, difference - half, difference + half)[0] == decision


def test_the_seeds_that_would_decide_are_the_fewest_that_do() -> None:
    seen = seed_difference({1: -0.002, 2: -0.001, 3: 0.0005}, 0.0, 0.95)
    assert decide(Gates(), seen.mean, seen.low, seen.high)[0] == "UNDECIDED"
    more = more_seeds(Gates(), seen, 0.95)
    assert more is not None
    widths = [stats.t.ppf(0.975, n - 1) * seen.sd / np.sqrt(n) for n in (3 + more - 1, 3 + more)]
    assert widths[1] < -seen.mean <= widths[0]
    assert more_seeds(Gates(accept=-0.01), seen, 0.95) is None
    assert more_seeds(Gates(), seed_difference({1: 1.0}, 0.9, 0.95), 0.95) is None


def test_every_seed_is_a_run_beside_the_control_of_its_seed(tmp_path: Path) -> None:
    trials = expand(spec_of(tmp_path, SEEDED), lambda _: 1)
    assert [trial.name for trial in trials[:3]] == ["control, seed 1", "wide, seed 1", "narrow, seed 1"]
    assert len(trials) == 9  # and no noise repeats
    assert trials[4].settings.train is not None
    assert trials[4].settings.train.set == ("model.mlp_mult=3", "run.seed=2")
    assert "seeds" not in trials[4].settings.facts()["train"]
    assert {trial.group for trial in trials} == {"seed 1", "seed 2", "seed 3"}


def test_verdicts_are_over_seeds_and_are_remembered(tmp_path: Path) -> None:
    state = state_of(spec_of(tmp_path, SEEDED))
    run(state, control=1.5, wide=1.4)
    first = state.listed[2]
    assert first.trial.name == "narrow, seed 1"
    state.rows[first.id] = Row("trial", first.id, name=first.trial.name, result={"screen": {"bpb": 1.6}})
    control, wide, narrow = outcomes(state)
    assert (control.mean, control.sd) == (pytest.approx(1.52), pytest.approx(0.01))
    assert wide.difference is not None
    assert (wide.decision, wide.difference.kind, wide.difference.mean) == ("PROMOTE", "paired", pytest.approx(-0.1))
    assert (narrow.decision, narrow.why) == ("UNDECIDED", "no interval over seeds")
    (remembered,) = outcome_rows(state, "s")  # narrow's other seeds are still to come
    assert (remembered.name, remembered.verdict) == ("s/wide against control", "positive")
    assert set(remembered.parents) == {f"{name}, seed {n}" for name in ("wide", "control") for n in (1, 2, 3)}
    assert "| wide | 3 of 3 | 1.42000 ± 0.01000 | -0.10000 |" in markdown(state, "s")


def test_seeds_that_the_control_lacks_are_compared_by_welch(tmp_path: Path) -> None:
    text = SEEDED.replace('set = ["model.mlp_mult=3"]', "seeds = [3, 4]")
    state = state_of(spec_of(tmp_path, text))
    run(state, control=1.5, wide=1.4)
    wide = next(one for one in outcomes(state) if one.name == "wide")
    assert wide.difference is not None
    assert (wide.difference.kind, wide.difference.mean) == ("Welch", pytest.approx(1.435 - 1.52))


def test_a_trial_that_is_killed_is_not_trained_with_more_seeds(tmp_path: Path) -> None:
    state = state_of(spec_of(tmp_path, SEEDED + "[gates]\nkill = 0.05\n"))
    waiting = next(one for one in state.listed if one.id == "narrow, seed 2")
    state.rows["control, seed 2"] = Row("trial", "x", result={"screen": {"bpb": 1.52}})
    assert not state.is_ready(waiting)  # until its first seed is there
    run(state, control=1.5)
    for name, bpb in (("wide", 1.5), ("narrow", 1.57)):
        state.rows[f"{name}, seed 1"] = Row("trial", name, result={"screen": {"bpb": bpb}})
    assert state.is_ready(waiting)
    assert "KILL after 1 of its seeds" in str(state.why_stopped(waiting))
    assert state.why_stopped(next(one for one in state.listed if one.id == "wide, seed 2")) is None


def test_halving_goes_on_with_the_better_half(tmp_path: Path) -> None:
    text = HALVING + "".join(f'[[trials]]\nname = "t{n}"\ntrain.set = ["model.mlp_mult={n}"]\n' for n in (4, 5))
    state = state_of(spec_of(tmp_path, text))
    long = [one for one in state.listed if one.trial.rung == 1]
    assert [one.trial.seed for one in long] == [1] * 5 + [2] * 5
    assert {one.trial.settings.train.steps for one in long if one.trial.settings.train} == {40}
    assert not any(state.is_ready(one) for one in long if one.trial.role == "trial")
    run(replace(state, listed=[one for one in state.listed if one.trial.rung == 0]),
        control=1.5, wide=1.4, narrow=1.6, t4=1.45, t5=1.7)  # fmt: skip
    run(replace(state, listed=long), control=1.5)
    assert all(state.is_ready(one) for one in long if one.trial.role == "trial")
    stopped = {one.trial.name: state.why_stopped(one) for one in long if one.trial.seed == 1}
    assert stopped["t4, rung 2, seed 1"] is None
    assert stopped["wide, rung 2, seed 1"] is None
    assert stopped["narrow, rung 2, seed 1"] == "place 3 of 4 in rung 1; 2 go on"
    assert stopped["t5, rung 2, seed 1"] == "place 4 of 4 in rung 1; 2 go on"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SEEDED.replace("[1, 2, 3]", "[1, 1]"), "seeds must differ"),
        (SEEDED.replace("mlp_mult=3", 'mlp_mult=3", "run.seed=4'), "two ways of saying which"),
        (HALVING.replace("[1, 2, 3]", "[1]"), r"takes up to 2 seeds of every trial, and 'control' has 1"),
        (HALVING.replace("steps = 40", "steps = 10"), "rungs must get longer"),
        (SEEDED + "[gates]\naccept = 0.1\n", "accept = 0.1"),
    ],
)
def test_seeds_that_cannot_be_meant_are_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        spec_of(tmp_path, text)


def test_gates_decide_on_trials_without_training_by_their_interval_over_the_text(lab: Lab) -> None:
    text = 'question = "?"\nnoise_repeats = 0\nbaselines = []\n[gates]\nkill = 0.0\n'
    text += '[grid]\n"*.hessian_lambda" = [0, 0.6]\n'
    state = lab.run(f"{text}[calibration]\ntokens = 320\n{STAGES}")
    (found,) = [one for one in outcomes(state) if one.difference is not None]
    row = next(row for row in state.rows.values() if row.settings["role"] == "trial")
    score = row.result["screen"]
    assert found.difference is not None
    assert (found.difference.mean, found.difference.high) == (score["difference_bpb"], score["high_bpb"])
    assert found.decision == decide(state.spec.gates, score["difference_bpb"], score["low_bpb"], score["high_bpb"])[0]

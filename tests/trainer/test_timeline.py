"""The predicted timeline is what the loop would do, and every check speaks when it should and only then."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import PICO_RECIPE
from trainer.config import Recipe
from trainer.plan.preflight import preflight, scoring_seconds
from trainer.plan.timeline import Timeline, count_steps, predict
from trainer.run.phases import PhaseTracker
from trainer.schedule.functions import active_loops_at, progress
from trainer.schedule.step_times import StepTimes, num_visits


def recipe_with(**tables: dict[str, Any]) -> Recipe:
    """The pico recipe without data, some keys changed."""
    tree: dict[str, Any] = {name: {**table, **tables.get(name, {})} for name, table in PICO_RECIPE.items()}
    tree["data"]["dir"] = "data/none"
    return Recipe.model_validate(tree)


def simulate(recipe: Recipe, times: StepTimes) -> tuple[dict[str, int], int, float, int]:
    """The training loop without training: (phase → step, steps, seconds, models in the running mean)."""
    tracker, fired = PhaseTracker.from_recipe(recipe), {}
    step, second, averaged = 0, 0.0, 0
    kept = recipe.schedule.reserve_seconds
    assert kept != "auto"
    while (at := progress(recipe.schedule, step, second, kept)) < 1.0:
        for name in (tracker.due(step, at) or "").split("+"):
            fired[name] = step
        loops = active_loops_at(recipe.schedule, recipe.model.num_loops, at)
        second += times.of(recipe.model, loops)
        step += 1
        start = recipe.optim.swa_start
        averaged += start is not None and at >= start and step % recipe.optim.swa_every == 0
    fired.pop("", None)
    return fired, step, second, averaged


eighths = st.integers(0, 8).map(lambda number: number / 8)  # dyadic, so that sums of step times are exact
step_seconds = st.integers(1, 64).map(lambda number: number / 64)


@given(
    steps=st.none() | st.integers(1, 90),
    seconds=st.integers(1, 16).map(float),
    kept=eighths.map(lambda share: share * 7 / 8),
    loops=st.tuples(eighths, eighths).map(sorted),
    warmdown=eighths,
    plain=step_seconds,
    extra=step_seconds,
    swa_every=st.integers(1, 9),
    wanted=st.lists(st.integers(0, 99), max_size=3),
)
def test_the_prediction_is_what_the_loop_does(
    steps: int | None,
    seconds: float,
    kept: float,
    loops: list[float],
    warmdown: float,
    plain: float,
    extra: float,
    swa_every: int,
    wanted: list[int],
) -> None:
    recipe = recipe_with(
        model={"num_loops": 2},
        optim={"swa_start": 0.5, "swa_every": swa_every},
        schedule={
            "steps": steps, "seconds": seconds, "loops_at": loops[0], "all_loops_at": loops[1], "warmdown": warmdown,
            "reserve_seconds": kept,
        },
        checkpoint={"steps": wanted, "fractions": [0.125, 0.6]},
    )  # fmt: skip
    times = StepTimes(plain, plain + 2 * extra, "given")
    timeline = predict(recipe, times)
    fired, end, second, averaged = simulate(recipe, times)
    assert {row.phase: row.step for row in timeline.boundaries if row.checkpoint} == {**fired, "final": end}
    assert (timeline.clock.end_step, timeline.seconds) == (end, second)
    assert count_steps(timeline.clock, lambda step, at: at >= 0.5, swa_every) == averaged
    assert timeline.num_checkpoints == len({*fired.values(), end})
    expected_never = {name for name in PhaseTracker.from_recipe(recipe).pending if name not in fired}
    assert expected_never == set(timeline.never) & PhaseTracker.from_recipe(recipe).pending.keys()


def test_a_very_long_run_is_predicted_at_once() -> None:
    timeline = predict(recipe_with(schedule={"steps": None, "seconds": 1e6}), StepTimes(1e-6, 2e-6, "given"))
    assert timeline.clock.end_step == pytest.approx(0.25e12 + 0.375e12, rel=1e-6)
    assert timeline.ends_by == "seconds"


def test_unknown_looped_times_follow_the_visits() -> None:
    model = recipe_with(model={"num_layers": 11, "loop_start": 3, "loop_end": 5, "num_loops": 2}).model
    assert [num_visits(model, loops) for loops in (0, 1, 2)] == [11, 14, 17]
    times = StepTimes.given(model, 1.1)
    assert [times.of(model, loops) for loops in (0, 1, 2)] == pytest.approx([1.1, 1.4, 1.7])
    assert StepTimes.given(model, 1.1, 1.2).of(model, 1) == pytest.approx(1.15)


def test_a_row_says_what_holds_there() -> None:
    recipe = recipe_with(
        optim={"momentum_start": 0.8, "momentum": 0.9, "swa_start": 0.5},
        schedule={"steps": 60, "shape": "wsd", "lr_warmup": 0.2, "weight_decay_taper_at": 0.5},
    )
    rows = {row.phase: row for row in predict(recipe, StepTimes(0.5, 1.0, "given")).boundaries}
    assert [rows[name].step for name in ("init", "lr_warmup_done", "loops_on", "weight_decay_taper")] == [0, 12, 15, 30]
    assert rows["init"].lr_multiplier == 0
    assert rows["frac75"].lr == pytest.approx({"matrix": 0.01, "embed": 0.015, "scalar": 0.01})
    assert rows["frac75"].weight_decay_multiplier == 0.5
    assert rows["frac75"].active_loops == 1
    assert rows["frac75"].second == 15 * 0.5 + 30 * 1.0
    assert [rows["init"].momentum, rows["final"].momentum] == pytest.approx([0.8, 0.9])
    unsaved = [name for name, row in rows.items() if not row.checkpoint]
    assert unsaved == ["lr_warmup_done", "weight_decay_taper", "swa_start"]


# ---- checks --------------------------------------------------------------------------------------------------------

CAP = {"seconds": 300.0, "reserve_seconds": 0.0}
GOOD: dict[str, dict[str, Any]] = {
    "schedule": {"steps": 600, "warmdown": 0.5, "loops_at": 0.25},
    "checkpoint": {"metric_tokens": 100},
}


def found(**tables: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(level, key, message) of a good run with some keys changed, 0.5 s a step and 1 s with loops."""
    merged = {name: {**GOOD.get(name, {}), **tables.get(name, {})} for name in GOOD.keys() | tables.keys()}
    timeline = predict(recipe_with(**merged), StepTimes(0.5, 1.0, "given"))
    return [(finding.level, finding.key, finding.message) for finding in preflight(timeline)]


def test_a_good_run_has_no_findings() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("tables", "key", "message"),
    [
        ({"checkpoint": {"steps": [600]}}, "checkpoint.steps", "step600 never comes; the run ends after 600 steps"),
        ({"checkpoint": {"steps": [19000]}, "schedule": {**CAP, "steps": 20000}}, "checkpoint.steps",
         "checkpoint.steps 19000: step19000 never comes; the run ends after 375 steps (schedule.seconds 300)"),
        ({"checkpoint": {"fractions": [0.999]}}, "checkpoint.fractions", "0.999: frac99.9 never comes"),
        ({"schedule": {"warmdown": 0.001}}, "schedule.warmdown", "warmdown 0.001: warmdown_start never comes"),
        ({"schedule": {"loops_at": 1.0}}, "schedule.loops_at", "loops_on never comes"),
        ({"schedule": {"all_loops_at": 1.0}, "model": {"num_loops": 2}}, "schedule.all_loops_at",
         "all_loops_on never comes"),
        ({"schedule": {"all_loops_at": 0.5}}, "schedule.all_loops_at", "acts only with model.num_loops of 2 or more"),
        ({"schedule": {"weight_decay_taper_at": 0.999}}, "schedule.weight_decay_taper_at", "never comes"),
        ({"optim": {"momentum_warmup_steps": 600}}, "optim.momentum_warmup_steps",
         "600 is not over before the run ends after 600 steps (schedule.steps 600); momentum would only reach 0.950"),
        ({"optim": {"momentum_warmup_steps": 1500}}, "optim.momentum_warmup_steps", "would only reach 0.890"),
        ({"optim": {"swa_start": 0.999}}, "optim.swa_start", "swa_start never comes"),
        ({"optim": {"swa_start": 0.9, "swa_every": 60}}, "optim.swa_every", "averages 1 model, at least 2"),
        ({"optim": {"ema_every": 601}}, "optim.ema_every", "no update"),
        ({"schedule": {**CAP, "steps": None, "hessian_seconds": 4.0}}, "schedule.reserve_seconds",
         "Hessians would end at 304.0 s, after schedule.seconds 300: training ends at 300.0 s, Hessians take 4 s; set"),
        ({"schedule": {**CAP, "steps": 375, "hessian_seconds": 0.5}}, "schedule.reserve_seconds", "end at 300.5 s"),
        ({"run": {"min_tokens_per_second": 129}}, "run.min_tokens_per_second", "0.5 s a step is 128 tokens/s"),
    ],
)  # fmt: skip
def test_what_can_never_act_is_refused(tables: dict[str, dict[str, Any]], key: str, message: str) -> None:
    refused = [finding for finding in found(**tables) if finding[0] == "refuse"]
    assert [finding[1] for finding in refused] == [key]
    assert message in refused[0][2]


@pytest.mark.parametrize(
    ("tables", "key", "message"),
    [
        ({"schedule": {**CAP, "steps": 20000}}, "schedule.steps",
         "schedule.steps 20,000 will not be reached: the run ends after 375 steps (schedule.seconds 300), 2% of them"),
        ({"optim": {"ema_decay": 0.995}}, "optim.ema_decay",
         "acts from step 1,790 on, and the run ends after 600 steps (schedule.steps 600); decays above 0.9852 are all"),
        ({"optim": {"momentum_cycle_steps": 598}}, "optim.momentum_cycle_steps", "598 is longer than the 597 steps"),
        ({"optim": {"swa_start": 0.2}}, "optim.swa_start", "comes before all loops are on at 0.250"),
        ({"checkpoint": {"metric_tokens": 5000}}, "checkpoint.metric_tokens", "scoring 5,000 tokens at 6 checkpoints"),
        ({"checkpoint": {"metric_tokens": None}}, "checkpoint.metric_tokens", "whole validation split"),
        ({"checkpoint": {"phases": ["init"], "fractions": []}}, "checkpoint.fractions", "nothing to average"),
        ({"schedule": {"steps": None, "seconds": 299.75, "reserve_seconds": 0.125}}, "schedule.reserve_seconds",
         "the last step and its snapshot would end at 300.00 s, after schedule.seconds 299.75"),
        ({"schedule": {"warmdown": 0.0}}, "checkpoint.fractions", "1 checkpoint from progress 1.000 on"),
    ],
)  # fmt: skip
def test_what_is_probably_not_meant_is_said(tables: dict[str, dict[str, Any]], key: str, message: str) -> None:
    findings = found(**tables)
    assert [(level, found_key) for level, found_key, _ in findings] == [("warn", key)]
    assert message in findings[0][2]


def test_a_decay_that_acts_in_the_last_step_is_not_warned_of() -> None:
    last = 601 / 610  # (1+t)/(10+t) at the 600th step
    assert found(optim={"ema_decay": last}) == []
    assert [key for _, key, _ in found(optim={"ema_decay": last + 1e-6})] == ["optim.ema_decay"]
    assert [key for _, key, _ in found(optim={"ema_decay": last, "ema_every": 7})] == ["optim.ema_decay"]  # 595, 602


def test_a_warm_down_follows_whichever_limit_ends_the_run() -> None:
    """The classic failure: 20,000 steps under a cap that comes long before; here the learning rate still falls."""
    recipe = recipe_with(schedule={**CAP, "steps": 20000, "warmdown": 0.2})
    timeline: Timeline = predict(recipe, StepTimes(0.5, 0.5, "given"))
    start = next(row for row in timeline.boundaries if row.phase == "warmdown_start")
    assert (start.step, timeline.clock.end_step) == (480, 600)
    assert timeline.boundaries[-1].lr_multiplier == 0


@pytest.mark.parametrize("hessian_seconds", [None, 4.0, "auto"])
def test_what_auto_reserves_keeps_everything_under_the_cap(hessian_seconds: float | str | None) -> None:
    schedule = {"steps": None, "seconds": 300.3, "hessian_seconds": hessian_seconds, "hessian_tokens": 512}
    timeline = predict(recipe_with(schedule=schedule, checkpoint=GOOD["checkpoint"]), StepTimes(0.5, 1.0, "given"))
    assert timeline.reserve
    end = timeline.seconds + timeline.reserve.after_last_step
    assert 300.3 - 1.0 <= end <= 300.3  # less than a step is given away
    assert [finding for finding in preflight(timeline) if finding.key == "schedule.reserve_seconds"] == []


def test_views_of_the_running_mean_are_scored_too() -> None:
    seconds = []
    for optim in ({"ema_decay": 0.0}, {}, {"swa_start": 0.5}):
        recipe = recipe_with(optim=optim, schedule={"steps": 64, "loops_at": 0.0, "warmdown": 0.5})
        seconds.append(scoring_seconds(predict(recipe, StepTimes(1.0, 1.0, "given")), metric_tokens=192))
    assert seconds == [5, 10, 12]  # 192 tokens/s; 5 folders, of which frac75 and final have a running mean

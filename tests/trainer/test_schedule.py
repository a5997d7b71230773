"""Schedules are pure functions of progress, and every phase boundary fires once."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from trainer.config import CheckpointSettings, DataSettings, Recipe
from trainer.optim.settings import OptimSettings
from trainer.run.phases import PhaseTracker, fraction_name
from trainer.schedule.functions import (
    ScheduleSettings,
    active_loops_at,
    cyclic_momentum,
    lr_multiplier,
    momentum_at,
    progress,
    warmdown_start,
    warmup_end,
    weight_decay_multiplier,
)
from trainer.schedule.lr_schedules import SCHEDULES, TIDAL_WARMUP, schedule_of

unit = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleSettings:
    """Any schedule of ten steps that settings allow, with a warm-down."""
    shape = draw(st.sampled_from(list(SCHEDULES)))
    warmup = 0.0 if SCHEDULES[shape].fixed_warmup else draw(st.floats(0, 0.4))
    return ScheduleSettings(
        steps=10, shape=shape, lr_warmup=warmup, warmdown=draw(st.floats(0.01, 0.6)), lr_floor=draw(unit)
    )


@given(at=unit, warmdown=unit, floor=unit)
def test_learning_rate_stays_between_floor_and_one(at: float, warmdown: float, floor: float) -> None:
    settings = ScheduleSettings(steps=10, warmdown=warmdown, lr_floor=floor)
    assert min(floor, 1.0) <= lr_multiplier(settings, at) <= 1.0 + 1e-9


@given(a=unit, b=unit, warmdown=st.floats(0.01, 1))
def test_learning_rate_never_rises(a: float, b: float, warmdown: float) -> None:
    settings = ScheduleSettings(steps=10, warmdown=warmdown)
    assert lr_multiplier(settings, max(a, b)) <= lr_multiplier(settings, min(a, b)) + 1e-12


def test_an_unknown_shape_is_refused_with_the_names_that_there_are() -> None:
    names = f"unknown schedule shape 'linaer'; choose one of {', '.join(SCHEDULES)}"
    with pytest.raises(SettingsError, match=f"recipe.toml: shape = 'linaer': .*{names}"):
        parse_settings(ScheduleSettings, {"steps": 10, "shape": "linaer"}, "recipe.toml")
    with pytest.raises(SettingsError, match=names):
        schedule_of("linaer")
    unchecked = ScheduleSettings(steps=10).model_copy(update={"shape": "linaer"})
    with pytest.raises(SettingsError, match=names):
        lr_multiplier(unchecked, 0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_shape_reads_what_its_row_says(name: str) -> None:
    row = SCHEDULES[name]
    assert [*inspect.signature(row.function).parameters] == ["at", "peak", *row.reads]
    assert set(row.reads) <= ScheduleSettings.model_fields.keys()
    assert row.source


@given(settings=schedules(), a=unit, b=unit)
def test_every_shape_rises_to_one_then_falls_to_the_floor(settings: ScheduleSettings, a: float, b: float) -> None:
    peak, low, high = warmup_end(settings), min(a, b), max(a, b)
    first, second = lr_multiplier(settings, low), lr_multiplier(settings, high)
    assert settings.lr_floor - 1e-12 <= first <= 1 + 1e-12
    if high < peak:
        assert first <= second + 1e-12
    if low >= peak:
        assert second <= first + 1e-12
    assert lr_multiplier(settings, peak) == pytest.approx(1)
    assert lr_multiplier(settings, 1.0) == pytest.approx(settings.lr_floor, abs=1e-12)


@given(settings=schedules(), at=st.floats(0, 0.999))
def test_the_learning_rate_never_jumps(settings: ScheduleSettings, at: float) -> None:
    steepest = 2 / min(warmup_end(settings) or 1, settings.warmdown, 1 - warmup_end(settings))
    moved = abs(lr_multiplier(settings, at + 1e-3) - lr_multiplier(settings, at))
    assert moved <= steepest * 1e-3 + 1e-9


@given(at=unit, warmdown=st.floats(0.01, 1))
def test_wsd_without_a_floor_is_linear_and_with_one_reaches_it_only_at_the_end(at: float, warmdown: float) -> None:
    linear, wsd = (ScheduleSettings(steps=10, shape=shape, warmdown=warmdown) for shape in ("linear", "wsd"))
    assert lr_multiplier(wsd, at) == pytest.approx(lr_multiplier(linear, at), abs=1e-12)
    floored = wsd.model_copy(update={"lr_floor": 0.1})
    assert lr_multiplier(floored, at) == pytest.approx(0.1 + 0.9 * lr_multiplier(wsd, at))


def test_the_record_schedule() -> None:
    record = ScheduleSettings(seconds=600, warmdown=0.85, lr_floor=0.1)
    found = [lr_multiplier(record, at) for at in (0.0, 0.15, 0.575, 0.9, 0.95, 1.0)]
    assert found == pytest.approx([1, 1, 0.5, 0.1 / 0.85, 0.1, 0.1])


def test_tidal_divides_the_run_by_the_golden_ratio() -> None:
    rest = 1 - TIDAL_WARMUP
    assert TIDAL_WARMUP / rest == pytest.approx(rest)
    tidal = ScheduleSettings(steps=10, shape="tidal")
    assert lr_multiplier(tidal, TIDAL_WARMUP / 2) == pytest.approx(0.5)
    assert lr_multiplier(tidal, TIDAL_WARMUP + rest / 2) == pytest.approx(0.5)
    assert warmdown_start(tidal) == TIDAL_WARMUP  # never before the peak


@given(start=st.floats(0, 0.99), a=unit, b=unit)
def test_weight_decay_tapers_to_nothing(start: float, a: float, b: float) -> None:
    settings = ScheduleSettings(steps=10, weight_decay_taper_at=start)
    assert weight_decay_multiplier(ScheduleSettings(steps=10), a) == 1.0
    assert weight_decay_multiplier(settings, start) == 1.0
    assert weight_decay_multiplier(settings, 1.0) == 0.0
    assert weight_decay_multiplier(settings, max(a, b)) <= weight_decay_multiplier(settings, min(a, b))


@given(step=st.integers(0, 10**6), period=st.integers(2, 500), low=st.floats(0, 0.9), width=st.floats(0, 0.09))
def test_momentum_cycles_between_its_bounds(step: int, period: int, low: float, width: float) -> None:
    momentum = cyclic_momentum(step, low, low + width, period)
    assert low - 1e-12 <= momentum <= low + width + 1e-12
    assert momentum == cyclic_momentum(step + period, low, low + width, period)
    assert cyclic_momentum(0, low, low + width, period) == pytest.approx(low + width)


def test_a_cycle_begins_where_the_warmup_ends_and_without_one_momentum_is_constant() -> None:
    cyclic = OptimSettings(momentum_warmup_steps=10, momentum_start=0.8, momentum_cycle_steps=50)
    found = [cyclic.momentum_for(step) for step in (0, 5, 10, 35, 60, 85)]
    assert found == pytest.approx([0.8, 0.875, 0.95, 0.85, 0.95, 0.85])
    constant = OptimSettings(momentum_warmup_steps=10, momentum_start=0.8, momentum=0.9)
    assert [constant.momentum_for(step) for step in (0, 5, 10, 35)] == pytest.approx([0.8, 0.85, 0.9, 0.9])


@given(at=unit, other=unit, num_loops=st.integers(0, 4), start=unit, all_at=unit)
def test_loops_only_ever_grow_and_two_phases_pass_through_one(
    at: float, other: float, num_loops: int, start: float, all_at: float
) -> None:
    start, all_at = min(start, all_at), max(start, all_at)
    once = ScheduleSettings(steps=10, loops_at=start)
    twice = ScheduleSettings(steps=10, loops_at=start, all_loops_at=all_at)
    assert active_loops_at(once, num_loops, at) == (num_loops if at >= start else 0)
    assert active_loops_at(twice, num_loops, at) in {0, min(1, num_loops), num_loops}
    early, late = (active_loops_at(twice, num_loops, when) for when in (min(at, other), max(at, other)))
    assert early <= late
    assert active_loops_at(twice, num_loops, 1.0) == num_loops


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr_warmup": 0.5, "warmdown": 0.6}, "lr_warmup 0.5 \\+ warmdown 0.6 is 1.100"),
        ({"shape": "wsd", "lr_warmup": 0.5}, "is 1.167 of the run, at most 1"),
        ({"shape": "tidal", "lr_warmup": 0.1}, "tidal warms up over 0.382"),
        ({"all_loops_at": 0.2, "loops_at": 0.4}, "all_loops_at 0.2 comes before loops_at 0.4"),
        ({"shape": "sine"}, "shape = 'sine'"),
        ({"weight_decay_taper_at": 1.0}, "weight_decay_taper_at = 1.0"),
        ({"reserve_seconds": 5.0}, "are parts of schedule.seconds, which is not set"),
        ({"hessian_seconds": "auto"}, "are parts of schedule.seconds, which is not set"),
        ({"seconds": 5.0, "reserve_seconds": 5.0}, "reserve_seconds 5.0 leaves nothing of seconds 5.0"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parse_settings(ScheduleSettings, {"steps": 10, **settings}, "recipe")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"momentum_cycle_low": 0.97}, "momentum_cycle_low 0.97 exceeds momentum_cycle_high 0.95"),
        ({"ema_every": 5, "ema_decay": 0}, "ema_every 5 acts only with ema_decay above 0"),
        ({"swa_every": 5}, "swa_every 5 acts only with swa_start"),
        ({"power_ema_snapshots": 8}, "power_ema_snapshots 8 acts only with power_ema_sigmas"),
        ({"momentum_cycle_high": 0.97}, "momentum_cycle_high 0.97 acts only with momentum_cycle_steps"),
        ({"swa_start": 1.0}, "swa_start = 1.0"),
    ],
)
def test_averages_and_cycles_that_cannot_act_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parse_settings(OptimSettings, settings, "recipe")


def test_progress_is_whichever_limit_is_nearer() -> None:
    both = ScheduleSettings(steps=20000, seconds=600)
    assert progress(both, 5000, 600) == 1.0
    assert progress(both, 5000, 0) == 0.25
    assert progress(ScheduleSettings(steps=10), 5, 1e9) == 0.5
    assert progress(ScheduleSettings(seconds=10), 10**9, 5) == 0.5


@given(seconds=st.floats(1, 1e4), share=st.floats(0, 0.9), elapsed=st.floats(0, 1e4))
def test_what_is_reserved_shortens_the_cap(seconds: float, share: float, elapsed: float) -> None:
    reserved = progress(ScheduleSettings(seconds=seconds), 0, elapsed, share * seconds)
    assert reserved == progress(ScheduleSettings(seconds=seconds - share * seconds), 0, elapsed)
    assert progress(ScheduleSettings(steps=10), 5, elapsed, share * seconds) == 0.5


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"schedule\.steps"):
        parse_settings(ScheduleSettings, {}, "recipe")


def test_momentum_warms_up_linearly() -> None:
    assert [momentum_at(step, 0.8, 0.9, 10) for step in (0, 5, 10, 99)] == pytest.approx([0.8, 0.85, 0.9, 0.9])
    assert momentum_at(0, 0.8, 0.9, 0) == 0.9


def test_every_boundary_fires_once_and_shares_its_step() -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"name": "x"},
            "data": {"dir": "d", "seq_len": 4, "batch_tokens": 8},
            "model": {"num_layers": 2, "num_loops": 1, "loop_end": 1},
            "optim": {"momentum_warmup_steps": 5},
            "schedule": {"steps": 10, "warmdown": 0.5, "loops_at": 0.2},
            "checkpoint": {"fractions": [0.75], "steps": [7]},
        }
    )
    tracker = PhaseTracker.from_recipe(recipe)
    fired = {step: phase for step in range(10) if (phase := tracker.due(step, step / 10))}
    assert fired == {0: "init", 2: "loops_on", 5: "momentum_warmup_done+warmdown_start", 7: "step7", 8: "frac75"}
    assert not tracker.pending


def test_batch_sizes_must_divide() -> None:
    with pytest.raises(SettingsError, match="batch_tokens 100 must be a multiple"):
        parse_settings(DataSettings, {"dir": "d", "seq_len": 16, "batch_tokens": 100}, "recipe")


def test_checkpoint_moments_must_lie_in_the_run() -> None:
    with pytest.raises(SettingsError, match="strictly between 0 and 1"):
        parse_settings(CheckpointSettings, {"fractions": [0.5, 1.0]}, "recipe")
    with pytest.raises(SettingsError, match=r"count from 0, got \[-3\]"):
        parse_settings(CheckpointSettings, {"steps": [3, -3]}, "recipe")


@given(a=st.integers(1, 999), b=st.integers(1, 999))
def test_fractions_have_names_of_their_own(a: int, b: int) -> None:
    assert (fraction_name(a / 1000) == fraction_name(b / 1000)) == (a == b)
    assert [fraction_name(f) for f in (0.05, 0.29, 0.7, 0.125)] == ["frac05", "frac29", "frac70", "frac12.5"]

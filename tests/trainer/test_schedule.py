"""Schedules are pure functions of progress, and every phase boundary fires once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from trainer.config import DataSettings, Recipe
from trainer.phases import PhaseTracker
from trainer.schedule import ScheduleSettings, lr_multiplier, momentum_at, progress

unit = st.floats(0, 1)


@given(at=unit, warmdown=unit, floor=unit)
def test_learning_rate_stays_between_floor_and_one(at: float, warmdown: float, floor: float) -> None:
    settings = ScheduleSettings(steps=10, warmdown=warmdown, lr_floor=floor)
    assert min(floor, 1.0) <= lr_multiplier(settings, at) <= 1.0 + 1e-9


@given(a=unit, b=unit, warmdown=st.floats(0.01, 1))
def test_learning_rate_never_rises(a: float, b: float, warmdown: float) -> None:
    settings = ScheduleSettings(steps=10, warmdown=warmdown)
    assert lr_multiplier(settings, max(a, b)) <= lr_multiplier(settings, min(a, b)) + 1e-12


def test_progress_is_whichever_limit_is_nearer() -> None:
    both = ScheduleSettings(steps=20000, seconds=600)
    assert progress(both, 5000, 600) == 1.0
    assert progress(both, 5000, 0) == 0.25
    assert progress(ScheduleSettings(steps=10), 5, 1e9) == 0.5
    assert progress(ScheduleSettings(seconds=10), 10**9, 5) == 0.5


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

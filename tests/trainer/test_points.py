"""Points of progress and multiplier: what they say by hand, what is refused, and that a run follows them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from pgolf_post.submit.forms import _settle_schedule
from pgolf_post.submit.sources import Sources
from tests.conftest import pico_recipe
from trainer.plan.timeline import predict
from trainer.run.loop import Trainer
from trainer.schedule import functions as schedule
from trainer.schedule.functions import ScheduleSettings, lr_multiplier, weight_decay_multiplier
from trainer.schedule.step_times import StepTimes

# a rise, a warm restart at 0.5 to half the peak, and a fall to nothing
RESTART = ((0.0, 0.0), (0.1, 1.0), (0.5, 0.2), (0.5, 0.5), (0.9, 0.0))
DECAY = ((0.25, 1.0), (0.75, 3.0))


def parsed(**settings: Any) -> ScheduleSettings:
    return parse_settings(ScheduleSettings, {"steps": 10, **settings}, "recipe")


def test_points_say_the_learning_rate_and_the_decay() -> None:
    settings = parsed(points=RESTART, weight_decay_points=DECAY)
    found = [lr_multiplier(settings, at) for at in (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert found == pytest.approx([0, 0.5, 1, 0.6, 0.5, 0.25, 0, 0])
    assert lr_multiplier(settings, 0.5 - 1e-9) == pytest.approx(0.2)  # the jump is at 0.5, not before
    found = [weight_decay_multiplier(settings, at) for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([1, 1, 2, 3, 3])


@given(at=st.floats(0, 1), floor=st.floats(0, 1), warmup=st.floats(0.01, 0.4))
def test_points_can_say_a_named_shape(at: float, floor: float, warmup: float) -> None:
    wsd = ScheduleSettings(steps=10, shape="wsd", lr_warmup=warmup, warmdown=0.5)
    same = ScheduleSettings(steps=10, points=((0, 0), (warmup, 1), (0.5, 1), (1, 0)))
    assert lr_multiplier(same, at) == pytest.approx(lr_multiplier(wsd, at), abs=1e-12)
    tapered = ScheduleSettings(steps=10, weight_decay_taper_at=warmup)
    taper = ScheduleSettings(steps=10, weight_decay_points=((warmup, 1), (1, 0)))
    assert weight_decay_multiplier(taper, at) == pytest.approx(weight_decay_multiplier(tapered, at), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"points": [[0.5, 1], [0.2, 0]]}, "points out of order: point 2 is at progress 0.2, point 1 at 0.5"),
        ({"weight_decay_points": [[0.5, 1], [0.2, 0]]}, "weight_decay_points = .*point 2 is at progress 0.2"),
        ({"points": [[0, 1], [0, 0.5]]}, "point 2 is at progress 0 as point 1 is"),
        ({"points": [[0.5, 1], [0.5, 0.5], [0.5, 0]]}, "a jump is two points at most"),
        ({"points": [[0.5, 1], [1.2, 0]]}, "points.1.0 = 1.2: .*less than or equal to 1"),
        ({"points": [[0.5, -1]]}, "points.0.1 = -1: .*greater than or equal to 0"),
        ({"points": [[0.5, 1, 2]]}, "points.0 = "),
        ({"points": [[0.5, 0]]}, "every multiplier is 0, so that nothing is trained"),
        ({"points": RESTART, "shape": "wsd"}, "shape wsd does nothing beside points"),
        ({"points": RESTART, "lr_warmup": 0.1}, "lr_warmup 0.1 does nothing beside points"),
        ({"points": RESTART, "lr_floor": 0.1}, "lr_floor 0.1 does nothing beside points"),
        (
            {"weight_decay_points": DECAY, "weight_decay_taper_at": 0.5},
            "weight_decay_taper_at 0.5 does nothing beside weight_decay_points",
        ),
    ],
)
def test_points_that_cannot_act_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parsed(**settings)


def test_the_dry_run_has_a_row_for_each_point(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path, schedule={"steps": 100, "points": RESTART, "weight_decay_points": DECAY})
    rows = {row.phase: row for row in predict(recipe, StepTimes(0.5, 1.0, "given")).boundaries}
    shown = {name: (row.step, row.lr_multiplier) for name, row in rows.items() if name.startswith("points@")}
    assert shown == {"points@0.1": (10, 1.0), "points@0.5": (50, 0.5), "points@0.9": (90, 0.0)}
    assert rows["weight_decay_points@0.75"].weight_decay_multiplier == 3.0
    assert not rows["points@0.5"].checkpoint


def test_a_script_follows_the_points() -> None:
    sources = Sources(["pgolf_post", "trainer"], {})
    settings = parsed(points=RESTART)
    _settle_schedule(sources, schedule, settings)
    node = sources.definition("trainer.schedule.functions:lr_multiplier").node
    assert isinstance(node, ast.FunctionDef)
    assert ast.unparse(node.body[0]) == f"return trainer.schedule.points:multiplier_along({RESTART!r}, at)"


@pytest.mark.slow
def test_a_run_follows_its_points_and_resumes_exactly(pico_data: DataFolder, tmp_path: Path) -> None:
    tables: dict[str, dict[str, object]] = {
        "schedule": {"points": RESTART, "weight_decay_points": DECAY},
        "checkpoint": {"steps": [6], "metric_tokens": 40},
    }
    whole = Trainer(pico_recipe(pico_data, tmp_path, **tables)).run()
    log = [json.loads(line) for line in (tmp_path / "pico" / "train.jsonl").read_text().splitlines()]
    recipe = pico_recipe(pico_data, tmp_path / "again", **tables)
    assert [record["lr_multiplier"] for record in log] == pytest.approx(
        [lr_multiplier(recipe.schedule, step / 12) for step in range(12)], abs=1e-6
    )
    assert log[6]["lr_multiplier"] == 0.5
    assert log[6]["weight_decay_multiplier"] == 2.0
    assert whole.meta["recipe"]["schedule"]["points"] == [list(point) for point in RESTART]
    resumed = Trainer(recipe)
    resumed.resume(next((tmp_path / "pico").glob("step_000006-*")))
    ours, theirs = resumed.run().load("raw").tensors, Checkpoint.open(whole.path).load("raw").tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

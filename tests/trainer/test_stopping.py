"""Stopping early: a run that is worse than another ends with a checkpoint, a ledger row and exit code 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.curves.reading import read_log
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, StoppedEarlyError
from pgolf_post.ledger.disk import run_row
from tests.conftest import pico_recipe
from trainer.config import Recipe
from trainer.plan.preflight import check_stop
from trainer.plan.timeline import Timeline, predict
from trainer.run.loop import Trainer
from trainer.run.stopping import StopSettings, StopWatch
from trainer.schedule.step_times import StepTimes

pytestmark = pytest.mark.slow


def better_log(pico_run: Path, path: Path, by: float, steps: int = 12) -> Path:
    """The pico run's losses lowered by so many nats, in a public script's form."""
    loss = read_log(pico_run / "pico").curve("train_loss")
    lines = [
        f"step:{step:g}/12 train_loss:{value - by:.6f} train_time:{step:g}ms"
        for step, value in zip(loss.step, loss.values, strict=True)
        if step <= steps
    ]
    path.write_text("\n".join(lines))
    return path


def recipe(pico_data: DataFolder, root: Path, **stop: Any) -> Recipe:
    return pico_recipe(pico_data, root, stop=stop)


def test_a_run_that_is_worse_ends_with_a_checkpoint_that_says_so(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path
) -> None:
    log = better_log(pico_run, tmp_path / "train.log", by=0.05)
    asked = recipe(pico_data, tmp_path / "stopped", against=log, at=[0.5], window=4.0)
    with pytest.raises(
        StoppedEarlyError, match=r"\+0\.0500 \(± 0\.0000\) from .*\.log; stop\.worse_by 0\.01"
    ) as caught:
        Trainer(asked).run()
    assert caught.value.exit_code == 5
    assert "--resume" in str(caught.value.hint)
    latest = Checkpoint.open(tmp_path / "stopped" / "latest")
    assert latest.path.name == "step_000006-stopped_early"
    facts = latest.meta["stopped_early"]
    assert (facts["at"], facts["by"], facts["paired"]) == (6.0, "step", True)
    assert facts["difference"] == pytest.approx(0.05, abs=1e-5)
    assert latest.meta["views"]["raw"]["metric"]["tokens"] > 0
    row = run_row(latest)
    assert row.result["stopped_early"] == facts["reason"]
    assert row.result["step"] == 6


def test_a_stopped_run_that_is_resumed_ends_as_if_it_had_never_stopped(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path
) -> None:
    log = better_log(pico_run, tmp_path / "train.log", by=0.05)
    asked = recipe(pico_data, tmp_path / "stopped", against=log, at=[0.5])
    with pytest.raises(StoppedEarlyError):
        Trainer(asked).run()
    again = Trainer(asked)
    again.resume(tmp_path / "stopped" / "latest")
    final = again.run()
    assert final.view_id("ema") == Checkpoint.open(pico_run / "latest").view_id("ema")
    assert "stopped_early" not in final.meta
    assert "stopped_early" not in run_row(final).result


@pytest.mark.parametrize("by", [0.0, 0.009, -0.5], ids=["equal", "within", "better"])
def test_a_run_that_is_not_worse_by_that_much_goes_on(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path, by: float, capfd: pytest.CaptureFixture[str]
) -> None:
    log = better_log(pico_run, tmp_path / "train.log", by=by)
    final = Trainer(recipe(pico_data, tmp_path / "whole", against=log, at=[0.25, 0.5])).run()
    assert final.meta["step"] == 12
    assert final.view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")
    assert capfd.readouterr().err.count("it goes on (stop.worse_by 0.01)") == 2


def test_a_log_that_ends_before_the_moment_is_said_and_stops_nothing(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = better_log(pico_run, tmp_path / "train.log", by=1.0, steps=4)
    final = Trainer(recipe(pico_data, tmp_path / "whole", against=log, at=[0.5])).run()
    assert final.meta["step"] == 12
    assert "reaches from 1 to 4 step, this run is at 6; not compared" in capfd.readouterr().err


def test_what_cannot_be_compared_is_refused_before_the_run(pico_data: DataFolder, tmp_path: Path) -> None:
    (tmp_path / "steps.log").write_text("step:5/9 train_loss:2.5\nstep:6/9 train_loss:2.5")
    for stop, error in (
        ({"against": tmp_path / "none.log"}, NotFoundError),
        ({"against": tmp_path / "steps.log", "by": "tokens"}, MismatchError),
    ):
        with pytest.raises(error):
            Trainer(recipe(pico_data, tmp_path / "run", **stop))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"worse_by": 0.1}, "worse_by does nothing without against"),
        ({"by": "tokens", "at": [0.5]}, "at, by do nothing without against"),
        ({"against": "x", "at": [1.0]}, r"strictly between 0 and 1, got \[1\.0\]"),
        ({"against": "x", "at": []}, "strictly between 0 and 1"),
    ],
    ids=["idle", "idle-two", "end", "never"],
)
def test_settings_that_cannot_act_are_refused(stop: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StopSettings.model_validate(stop)


def test_moments_come_once_and_those_behind_a_resumed_run_never(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("step:5/9 train_loss:2.5")
    watch = StopWatch(StopSettings(against=tmp_path / "a.log", at=(0.25, 0.5, 0.75)), 0.3)
    assert [watch.due(at) for at in (0.4, 0.5, 0.51, 0.9, 1.0)] == [False, True, False, True, False]
    assert not StopWatch(StopSettings(), 0.0).due(1.0)


def test_the_dry_run_finds_a_log_that_is_too_short_or_missing(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path
) -> None:
    log = better_log(pico_run, tmp_path / "train.log", by=0.0, steps=4)

    def findings(**stop: Any) -> list[str]:
        return [finding.level for finding in check_stop(timeline(recipe(pico_data, tmp_path, **stop)))]

    assert findings() == []
    assert findings(against=log, at=[0.25]) == []
    assert findings(against=log, at=[0.25, 0.5, 0.75]) == ["warn"] * 2
    assert findings(against=tmp_path / "none.log") == ["refuse"]


def timeline(asked: Recipe) -> Timeline:
    return predict(asked, StepTimes.given(asked.model, 0.1, None))

"""What stays of a run: boundaries, the newest periodic checkpoints, and whatever something else needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pgolf_post.base.storage import read_json, write_json
from pgolf_post.checkpoint import Checkpoint, list_checkpoints, point_latest
from pgolf_post.data import DataFolder
from tests.conftest import pico_recipe
from trainer.config import CheckpointSettings
from trainer.run.loop import Trainer
from trainer.run.phases import Periodic
from trainer.run.retention import apply_retention

pytestmark = pytest.mark.slow

PERIODIC: dict[str, Any] = {"phases": ("init", "warmdown_start", "final"), "fractions": (), "every_steps": 2}
KEEP_ONE = CheckpointSettings(every_steps=2, keep_last=1)


def names(root: Path) -> list[str]:
    return sorted(checkpoint.path.name for checkpoint in list_checkpoints(root))


@pytest.fixture
def run(tmp_path: Path, pico_data: DataFolder) -> Path:
    """The checkpoint root of a run that kept every periodic checkpoint: after steps 2, 4, 8 and 10."""
    Trainer(pico_recipe(pico_data, tmp_path / "root", checkpoint=PERIODIC)).run()
    return tmp_path / "root"


def test_periodic_checkpoints_are_those_that_mark_no_boundary(run: Path) -> None:
    assert names(run) == [
        "step_000000-init",
        "step_000002-periodic",
        "step_000004-periodic",
        "step_000006-warmdown_start",
        "step_000008-periodic",
        "step_000010-periodic",
        "step_000012-final",
    ]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_newest_periodic_checkpoints_and_every_boundary_stay(
    tmp_path: Path, pico_data: DataFolder, keep_last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**PERIODIC, "keep_last": keep_last}
    Trainer(pico_recipe(pico_data, tmp_path, checkpoint=settings)).run()
    found = names(tmp_path)
    assert [name for name in found if "periodic" not in name] == [
        "step_000000-init", "step_000006-warmdown_start", "step_000012-final",
    ]  # fmt: skip
    periodic = ["step_000004-periodic", "step_000008-periodic", "step_000010-periodic"]
    assert [name for name in found if "periodic" in name] == periodic[-keep_last:]
    assert f"step_000002-periodic: checkpoint.keep_last {keep_last}" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_run_with_retention_ends_where_one_without_does(tmp_path: Path, pico_data: DataFolder, run: Path) -> None:
    settings = {**PERIODIC, "keep_last": 1, "keep_optimizer_state": "last"}
    final = Trainer(pico_recipe(pico_data, tmp_path / "kept", checkpoint=settings)).run()
    assert final.view_id("raw") == Checkpoint.open(run / "latest").view_id("raw")
    newest = next((tmp_path / "kept" / "pico").glob("*10-periodic"))
    assert not (newest / "training.safetensors").exists()
    assert (final.path / "training.safetensors").is_file()


def test_what_latest_points_at_is_never_deleted(run: Path) -> None:
    point_latest(run, Checkpoint.open(run / "pico" / "step_000004-periodic"))
    apply_retention(run, run / "pico", KEEP_ONE)
    assert [name for name in names(run) if "periodic" in name] == ["step_000004-periodic", "step_000010-periodic"]


def test_what_has_results_is_never_deleted(run: Path) -> None:
    (run / "pico" / "step_000002-periodic" / "derived" / "stats").mkdir(parents=True)
    apply_retention(run, run / "pico", KEEP_ONE)
    assert [name for name in names(run) if "periodic" in name] == ["step_000002-periodic", "step_000010-periodic"]


@pytest.mark.parametrize("as_record", [True, False])
def test_what_another_checkpoint_names_as_its_parent_is_never_deleted(run: Path, as_record: bool) -> None:
    parent = Checkpoint.open(run / "pico" / "step_000008-periodic").view_id("ema")
    child = run / "pico" / "step_000012-final" / "meta.json"
    write_json(child, {**read_json(child), "parents": [{"id": parent, "share": 1.0} if as_record else parent]})
    apply_retention(run, run / "pico", KEEP_ONE)
    assert [name for name in names(run) if "periodic" in name] == ["step_000008-periodic", "step_000010-periodic"]


def test_other_runs_are_left_alone(tmp_path: Path, pico_data: DataFolder, run: Path) -> None:
    settings = {**PERIODIC, "keep_last": 1, "keep_optimizer_state": "last"}
    before = {path for path in (run / "pico").rglob("*") if path.is_file()}
    Trainer(pico_recipe(pico_data, run, run={"name": "other"}, checkpoint=settings)).run()
    assert {path for path in (run / "pico").rglob("*") if path.is_file()} == before


def test_optimizer_state_stays_with_the_newest_and_with_latest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point_latest(run, Checkpoint.open(run / "pico" / "step_000004-periodic"))
    apply_retention(run, run / "pico", CheckpointSettings(keep_optimizer_state="last"))
    having = sorted(path.parent.name for path in run.rglob("training.safetensors") if not path.parent.is_symlink())
    assert set(having) == {"step_000004-periodic", "step_000012-final"}
    assert capsys.readouterr().err.count('training.safetensors: checkpoint.keep_optimizer_state "last"') == 5
    for checkpoint in list_checkpoints(run):
        assert checkpoint.load("ema").id == checkpoint.view_id("ema")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 2}, "acts only on periodic checkpoints"),
        ({"optimizer_state": False, "keep_optimizer_state": "last"}, "acts only with optimizer_state"),
        ({"keep_last": 0, "every_steps": 1}, "greater than or equal to 1"),
    ],
)
def test_a_policy_that_cannot_act_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CheckpointSettings(**settings)


def test_a_period_comes_round_by_steps_and_by_seconds_and_not_twice_after_resuming() -> None:
    periodic = Periodic(every_steps=3, every_seconds=10.0)
    asked = [periodic.due(step, 2.5 * step) for step in range(9)]
    assert [step for step, due in enumerate(asked) if due] == [3, 4, 6, 8]
    resumed = Periodic(every_steps=3, every_seconds=10.0)
    resumed.skip_past(6, 15.0)
    assert [step for step in range(6, 9) if resumed.due(step, 2.5 * step)] == [8]
    assert not any(Periodic(None, None).due(step, step) for step in range(5))

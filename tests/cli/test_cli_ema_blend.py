"""`pgolf-post ema-blend`: what a shell sees."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from tests import processes
from tests.conftest import pico_recipe
from trainer.run.loop import Trainer


@pytest.fixture(scope="module")
def tracks_original(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Path:
    """The folder of a run that snapshotted two tracks. Do not change it."""
    root = tmp_path_factory.mktemp("tracks")
    optim = {"power_ema_sigmas": (0.05, 0.1)}
    Trainer(pico_recipe(pico_data, root, run={"name": "tracks"}, schedule={"steps": 60}, optim=optim)).run()
    return root / "tracks"


@pytest.fixture
def tracks(tmp_path: Path, pgolf: Any, tracks_original: Path) -> Any:
    """`pgolf-post …` where that run, the newest, is checkpoints/tracks."""
    shutil.copytree(tracks_original, tmp_path / "checkpoints" / "tracks")
    return pgolf


def test_each_length_is_a_checkpoint_and_a_row(tracks: Any) -> None:
    answer = tracks("ema-blend", "--sigma", "0.075,0.1", "--half-life-steps", "4", "--json")
    assert answer.code == 0, answer.err
    averages = answer.json["averages"]
    assert [row["average"] for row in averages] == ["sigma 0.075", "sigma 0.1", "half-life 4 steps"]
    assert [row["no_op"] for row in averages] == [False, True, False]
    assert not any(row["cached"] for row in averages)
    for row in averages:
        checkpoint = Checkpoint.open(Path(row["checkpoint"]))
        assert checkpoint.meta["views"]["raw"]["metric"]["bpb"] == row["bpb"]
        assert checkpoint.path.name in answer.err
        assert tracks("checkpoint", "verify", row["checkpoint"]).code == 0
    shown = tracks("show", averages[0]["checkpoint"])
    assert "ema-blend" in shown.err
    assert "power_ema" in shown.err
    again = tracks("ema-blend", "--sigma", "0.075,0.1", "--half-life-steps", "4", "--json")
    assert all(row["cached"] for row in again.json["averages"])
    assert [row["checkpoint_id"] for row in again.json["averages"]] == [row["checkpoint_id"] for row in averages]


def test_lengths_are_compared_after_fit_with_the_runs_own_weights(tracks: Any) -> None:
    few = ("--after-fit", 6000, "--search-tokens", 160, "--calibration-tokens", 256)
    answer = tracks("ema-blend", "--sigma", "0.075", *few, "--json")
    assert answer.code == 0, answer.err
    search = answer.json["search"]
    assert [row["name"] for row in search["candidates"]] == ["EMA", "sigma 0.075"]
    assert search["after_fit"]["averages"]["sigma 0.075"]["gap_bpb"] > 0
    kept = Checkpoint.open(Path(answer.json["averages"][0]["checkpoint"])).path / "derived" / "artifact"
    assert len(list(kept.iterdir())) == 1
    assert "snapshots of the run" in answer.err
    assert "saving held the run up" in answer.err


def test_an_average_by_name_is_that_of_its_own_command(tracks: Any) -> None:
    answer = tracks("swa-blend", "--method", "power-ema", "--set", "sigma=0.075", "--json")
    assert answer.code == 0, answer.err
    own = tracks("ema-blend", "--sigma", "0.075", "--json").json["averages"][0]
    assert (answer.json["checkpoint_id"], own["cached"]) == (own["checkpoint_id"], True)
    unknown = tracks("swa-blend", "--method", "mean")
    assert unknown.code == 2
    assert "known: swa, power-ema, half-life-ema" in unknown.err
    assert tracks("swa-blend", "--method", "swa", "--last", 2).code == 2
    assert tracks("swa-blend", "--set", "last=2").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say which lengths"),
        (("--sigma", "0.05;0.1"), 2, "expected numbers with commas between them"),
        (("--sigma", "0.4"), 2, "sigma 0.4 is outside"),
        (("--half-life-steps", "0"), 2, "half-life 0 steps must be above 0"),
        (("--sigma", "0.1", "--end-step", "61"), 2, "--end-step 61 is outside 1 … 60"),
        (("--half-life-steps", "0.1"), 2, "reconstruction error"),
        (("checkpoints/pico/step_000012-final", "--sigma", "0.1"), 1, "kept no power-function averages"),
    ],
)
def test_what_cannot_be_made_is_said(tracks: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    answer = tracks("ema-blend", *arguments, "--json")
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.err


def test_a_dry_run_states_the_disk_and_refuses_what_cannot_act(pico_run: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "trainer" / "recipes" / "record_8xh100.toml"
    data = Checkpoint.open(pico_run / "latest").meta["data_dir"]
    overrides = [f"data.dir={data}", "checkpoint.every_seconds=900", "optim.power_ema_snapshots=9000"]
    arguments = [part for override in overrides for part in ("--set", override)]
    words = ["-m", "trainer", str(recipe), "--dry-run", "--step-seconds", "0.1", *arguments]
    done = processes.run(words, cwd=tmp_path)
    assert done.returncode == 2
    assert "GB of snapshots for post-hoc EMA" in done.stderr
    assert "refuse: checkpoint.every_seconds 900: the run ends after" in done.stderr
    assert "refuse: optim.power_ema_snapshots 9000: the run ends after" in done.stderr

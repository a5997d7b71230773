"""`python -m trainer`: a run never overwrites another, and a stopped one leaves complete checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint, list_checkpoints


@pytest.fixture
def recipe(pico_run_original: Path, tmp_path: Path) -> Path:
    """The pico run's recipe as a file; its checkpoints go to checkpoints/ of the working folder."""
    tables = Checkpoint.open(pico_run_original / "latest").meta["recipe"]
    tables["run"] |= {"name": "again", "checkpoint_root": "checkpoints"}
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)]
    path = tmp_path / "pico.toml"
    path.write_text("\n".join(lines))
    return path


def files_in(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_run_answers_with_its_final_checkpoint_and_a_second_of_its_name_is_refused(
    train: Any, recipe: Path, tmp_path: Path, pico_run_original: Path
) -> None:
    answer = train(recipe, "--json")
    assert answer.code == 0, answer.err
    final = Checkpoint.open(Path(answer.json["checkpoint"]))
    assert final.meta["phase"] == "final"
    assert final.path == (tmp_path / "checkpoints" / "latest").resolve().relative_to(tmp_path)
    assert answer.json["checkpoint_id"] == final.view_id("raw")
    assert answer.json["views"] == {name: view["metric"] for name, view in final.meta["views"].items()}
    assert final.view_id("raw") == Checkpoint.open(pico_run_original / "latest").view_id("raw")  # same recipe, same run
    before = files_in(tmp_path)
    refused = train(recipe, "--json")
    assert (refused.code, refused.out) == (1, "")
    assert "already holds checkpoints; a run never overwrites another" in refused.err
    assert "next: choose another name with --set run.name=NAME" in refused.err
    assert files_in(tmp_path) == before
    renamed = train(recipe, "--json", "--set", "run.name=third", "--set", "schedule.steps=1")
    assert Path(renamed.json["checkpoint"]).parent.name == "third"


def test_a_misspelt_key_exits_2_as_a_process(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", recipe, "--set", "optim.matrix_lrr=0.1", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown key 'optim.matrix_lrr' (did you mean 'matrix_lr'?)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.matrix_lr=-1", "optim.matrix_lr = -1"),
        ("data.batch_tokens=65", "batch_tokens 65"),
        ("model.num_kv_heads=3", "num_heads 2 is not a multiple of num_kv_heads 3"),
        ("run.name=../x", "run.name = '../x'"),
        ("schedule", "expected key=value"),
    ],
)
def test_a_recipe_that_cannot_be_used_exits_2_before_anything_is_written(
    train: Any, recipe: Path, tmp_path: Path, override: str, named: str
) -> None:
    answer = train(recipe, "--set", override)
    assert (answer.code, answer.out) == (2, "")
    assert named in answer.err
    assert not (tmp_path / "checkpoints").exists()


def test_a_recipe_that_is_not_there_exits_1_and_no_recipe_exits_2(train: Any, tmp_path: Path) -> None:
    absent = train(tmp_path / "absent.toml")
    assert absent.code == 1
    assert "absent.toml" in absent.err
    assert train().code == 2


@pytest.mark.parametrize(("world_size", "code"), [("2", 2), ("8", 2), ("1", 0)])
def test_several_processes_are_refused(
    train: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: str, code: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    answer = train(recipe, "--set", "schedule.steps=1")
    assert answer.code == code, answer.err
    assert ("one process" in answer.err) == (code == 2)
    assert (tmp_path / "checkpoints").exists() == (code == 0)


def test_an_interrupted_run_exits_130_and_everything_it_saved_is_complete(recipe: Path, tmp_path: Path) -> None:
    overrides = [f"checkpoint.steps={list(range(1, 2000))}", "schedule.steps=100000", "checkpoint.metric_tokens=40"]
    arguments = [part for override in overrides for part in ("--set", override)]
    with subprocess.Popen(
        [sys.executable, "-m", "trainer", recipe, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        seen = 0
        for line in process.stderr:  # stop it some saves into the run
            seen += line.startswith("saved ")
            if seen == 5:
                os.kill(process.pid, signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.endswith("interrupted; nothing was left half-written\n")
    run = tmp_path / "checkpoints" / "again"
    folders = {path.name for path in run.iterdir() if path.is_dir() and not path.name.startswith(".tmp-")}
    complete = list_checkpoints(tmp_path / "checkpoints")
    assert {checkpoint.path.name for checkpoint in complete} == folders
    assert len(complete) >= 5
    for checkpoint in complete:
        for name in ("raw", "ema"):
            assert checkpoint.load(name).id == checkpoint.view_id(name)
    assert Checkpoint.open(tmp_path / "checkpoints" / "latest").path.name in folders

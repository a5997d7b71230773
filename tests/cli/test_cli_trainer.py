"""`python -m trainer`: a run never overwrites another, and a stopped one leaves complete checkpoints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from tests import processes


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
    done = processes.run(["-m", "trainer", str(recipe), "--set", "optim.matrix_lrr=0.1", "--json"], cwd=tmp_path)
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


def test_a_dry_run_shows_the_timeline_and_writes_nothing(train: Any, recipe: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    answer = train(recipe, "--dry-run", "--step-seconds", "0.5", "--looped-step-seconds", "1", "--json")
    assert answer.code == 0, answer.err
    assert files_in(tmp_path) == before
    assert [(row["phase"], row["step"], row["second"]) for row in answer.json["boundaries"]] == [
        ("init", 0, 0.0),
        ("momentum_warmup_done", 3, 1.5),
        ("loops_on", 3, 1.5),
        ("warmdown_start", 6, 4.5),
        ("frac75", 9, 7.5),
        ("final", 12, 10.5),
    ]
    assert answer.json["step_seconds"] == {"plain": 0.5, "looped": 1.0, "origin": "given"}
    assert (answer.json["steps"], answer.json["seconds"], answer.json["tokens"]) == (12, 10.5, 12 * 64)
    for shown in ("warmdown_start", "lr matrix", "momentum", "loops", "4 block visits instead of 3"):
        assert shown in answer.err


def test_a_dry_run_shows_what_the_cap_leaves_and_refuses_hessians_after_it(train: Any, recipe: Path) -> None:
    capped = [f"--set=schedule.{key}" for key in ("steps=100000", "seconds=20.5", "hessian_seconds=4.0")]
    answer = train(recipe, "--dry-run", "--step-seconds=0.5", "--looped-step-seconds=1", "--json", *capped)
    assert answer.code == 0, answer.err
    assert answer.json["reserve"] == {
        "seconds": 5.0, "last_step": 1.0, "snapshot": 0.0, "hessians": 4.0, "origin": "estimated",
    }  # fmt: skip
    assert answer.json["seconds"] == 16.0  # a last step that began just before 15.5
    assert "cap 20.5 s: 5 s reserved (last step 1 s" in answer.err
    assert "training ends at 16.0 s, Hessians at 20.0 s" in answer.err
    late = train(recipe, "--dry-run", "--step-seconds=0.5", "--json", *capped, "--set=schedule.reserve_seconds=2")
    assert late.code == 2
    assert [finding["key"] for finding in late.json["findings"] if finding["level"] == "refuse"] == [
        "schedule.reserve_seconds"
    ]
    assert "Hessians would end at" in late.err


def test_a_dry_run_measures_what_the_cap_must_leave(train: Any, recipe: Path) -> None:
    answer = train(recipe, "--dry-run", "--json", "--set=schedule.seconds=1e6", "--set=schedule.hessian_seconds=auto")
    assert answer.code == 0, answer.err
    assert answer.json["reserve"]["origin"] == "measured"
    assert answer.json["reserve"]["hessians"] > 0


def test_a_dry_run_predicts_the_folders_of_the_run(train: Any, recipe: Path, tmp_path: Path) -> None:
    planned = train(recipe, "--dry-run", "--step-seconds", "0.5", "--json").json["boundaries"]
    assert train(recipe).code == 0
    found = {int(c.meta["step"]): set(c.meta["phase"].split("+")) for c in list_checkpoints(tmp_path / "checkpoints")}
    wanted: dict[int, set[str]] = {}
    for row in planned:
        wanted.setdefault(row["step"], set()).add(row["phase"])
    assert found == wanted


def test_a_dry_run_measures_four_steps_and_leaves_nothing(train: Any, recipe: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    answer = train(recipe, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    times = answer.json["step_seconds"]
    assert times["origin"] == "measured"
    assert 0 < times["plain"] <= times["looped"]
    assert files_in(tmp_path) == before


def test_a_dry_run_with_a_given_time_needs_no_data(train: Any, recipe: Path) -> None:
    absent = ("--set", "data.dir=nowhere", "--set", "optim.ema_decay=0.5")
    assert train(recipe, "--dry-run", "--step-seconds", "0.5", *absent).code == 0
    assert train(recipe, "--dry-run", *absent).code == 1  # measuring does


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["checkpoint.steps=[5, 12]"], "checkpoint.steps"),
        (["schedule.steps=20000", "schedule.seconds=5", "checkpoint.steps=[19000]"], "checkpoint.steps"),
        (["schedule.warmdown=0.01"], "schedule.warmdown"),
        (["optim.momentum_warmup_steps=1500"], "optim.momentum_warmup_steps"),
        (["optim.swa_start=0.9", "optim.swa_every=50"], "optim.swa_every"),
        (["run.min_tokens_per_second=1e6"], "run.min_tokens_per_second"),
    ],
)
def test_a_dry_run_refuses_what_can_never_act_with_exit_2(
    train: Any, recipe: Path, tmp_path: Path, overrides: list[str], key: str
) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    answer = train(recipe, "--dry-run", "--step-seconds", "0.5", "--json", *arguments)
    assert answer.code == 2
    assert [finding["key"] for finding in answer.json["findings"] if finding["level"] == "refuse"] == [key]
    assert f"refuse: {key} " in answer.err
    assert f"1 setting cannot act in this run: {key}" in answer.err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--step-seconds", "0.5"), "add --dry-run"),
        (("--dry-run", "--step-seconds", "0"), "0.0 is not in the range x>0"),
        (("--dry-run", "--looped-step-seconds", "1"), "needs --step-seconds"),
        (("--dry-run", "--resume", "checkpoints/latest"), "leave --resume out"),
    ],
)
def test_options_that_do_not_go_together_exit_2(
    train: Any, recipe: Path, arguments: tuple[str, ...], named: str
) -> None:
    answer = train(recipe, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert named in answer.err


def test_the_running_mean_is_a_view_for_every_command(train: Any, pgolf: Any, recipe: Path, tmp_path: Path) -> None:
    run = train(recipe, "--set", "optim.swa_start=0.5", "--set", "optim.swa_every=2", "--json").json
    assert set(run["views"]) == {"raw", "ema", "swa"}
    verified = pgolf("checkpoint", "verify", run["checkpoint"], "--json")
    assert verified.code == 0, verified.err
    assert set(verified.json["views"]) == {"raw", "ema", "swa"}
    scored = pgolf("eval", run["checkpoint"], "--weights", "swa", "--json")
    swa_id = Checkpoint.open(Path(run["checkpoint"])).view_id("swa")
    assert f"(swa weights, id {swa_id[:12]})" in scored.err
    assert scored.json["tokens"] > 0
    without = pgolf("eval", "checkpoints/pico/step_000012-final", "--weights", "swa")
    assert without.code == 1
    assert "has no 'swa' weights; it has raw, ema" in without.err


def test_a_run_that_is_too_slow_exits_1_and_names_the_key(train: Any, recipe: Path) -> None:
    answer = train(recipe, "--set", "run.min_tokens_per_second=1e12", "--json")
    assert (answer.code, answer.out) == (1, "")
    assert "run.min_tokens_per_second is 1,000,000,000,000" in answer.err


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_saves_a_checkpoint_and_says_how_to_go_on(
    recipe: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    overrides = [f"checkpoint.steps={list(range(1, 2000))}", "schedule.steps=100000", "checkpoint.metric_tokens=40"]
    arguments = [part for override in overrides for part in ("--set", override)]
    words = ["-m", "trainer", str(recipe), *arguments]
    with processes.Process(words, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr
        seen = 0
        for line in process.stderr:  # stop it some saves into the run
            seen += line.startswith("saved ")
            if seen == 5:
                os.kill(process.pid, stop)
                break
        rest = process.stderr.read()
    assert process.returncode == code
    assert f"{stop.name}: stopping after this step" in rest
    assert rest.endswith("interrupted; nothing was left half-written\n")
    (go_on,) = [line for line in rest.splitlines() if line.startswith("go on: ")]
    words = shlex.split(go_on.removeprefix("go on: "))
    resumable = tmp_path / words[-1]
    assert (resumable / "training.safetensors").is_file()
    assert resumable.name.endswith("-interrupted")
    assert words[:-1] == ["python", "-m", "trainer", str(recipe), *arguments, "--resume"]
    run = tmp_path / "checkpoints" / "again"
    folders = {path.name for path in run.iterdir() if path.is_dir() and not path.name.startswith(".tmp-")}
    complete = list_checkpoints(tmp_path / "checkpoints")
    assert {checkpoint.path.name for checkpoint in complete} == folders
    assert len(complete) >= 5
    for checkpoint in complete:
        for name in ("raw", "ema"):
            assert checkpoint.load(name).id == checkpoint.view_id(name)
    assert Checkpoint.open(tmp_path / "checkpoints" / "latest").path.name in folders


def test_training_goes_on_when_the_reader_of_its_output_goes_away(recipe: Path, tmp_path: Path) -> None:
    words = ["-m", "trainer", str(recipe)]
    with processes.Process(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert list((tmp_path / "checkpoints").glob("*/step_*-final/meta.json"))


def test_a_dry_run_refuses_a_run_that_needs_more_disk_space_than_is_free(
    train: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = train(recipe, "--dry-run", "--step-seconds", "0.1", "--json")
    assert enough.code == 0, enough.err
    need = sum(enough.json["disk_bytes"].values())
    for free, code in ((need, 0), (need - 1, 2)):
        monkeypatch.setattr("trainer.plan.dry_run.free_bytes", lambda _, free=free: free)
        answer = train(recipe, "--dry-run", "--step-seconds", "0.1")
        assert answer.code == code, answer.err
    assert "run.checkpoint_root" in answer.err
    assert "free, the run writes up to" in answer.err

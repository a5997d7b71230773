"""A sweep's budget, and how its trainings are called: by functions, without training anything."""

from __future__ import annotations

import sys
import tomllib

import click
import pytest

from pgolf_post.cli.sweep import seconds_of_budget
from pgolf_post.data import DataFolder
from pgolf_post.ledger import Row
from pgolf_post.sweep.run import Sweep, work
from pgolf_post.sweep.settings import TrainStage
from pgolf_post.sweep.spending import BudgetSpentError
from pgolf_post.sweep.trainer_process import Asked, as_toml, folder_name, run_trainer, trainer_command
from pgolf_post.sweep.training import run_id, run_name
from tests.conftest import pico_recipe, write_recipe
from tests.sweep.conftest import Lab, spec_text


def test_dollars_are_seconds_at_their_price() -> None:
    assert seconds_of_budget(None, 2.0, 4.0) == 1800.0
    assert seconds_of_budget(600.0, 2.0, 4.0) == 600.0
    assert seconds_of_budget(None, None, 4.0) is None
    with pytest.raises(click.UsageError, match="--max-dollars needs --dollars-per-hour"):
        seconds_of_budget(None, 2.0, None)


def test_a_training_is_stopped_when_no_seconds_are_left() -> None:
    with pytest.raises(BudgetSpentError, match="training was stopped after"):
        run_trainer([sys.executable, "-c", "import time; time.sleep(60)"], lambda: 0.05)
    assert run_trainer([sys.executable, "-c", "print(1)"], lambda: None)[:2] == (0, "1\n")


def test_what_does_not_fit_waits_and_the_rest_is_run(
    lab: Lab, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(pico_recipe(pico_data, lab.root), lab.folder / "recipe.toml")
    text = (
        f'question = "?"\nnoise_repeats = 0\nbaselines = []\n[[trials]]\nname = "long"\ntrain = {{recipe = "{recipe}", '
    )
    text += 'seconds = 5000}\n[[trials]]\nname = "other"\ncodec = "brotli"\n'
    sweep = Sweep(lab.options(spec_text(text), max_seconds=4000.0))
    state = work(sweep)
    assert [one.trial.name for one in state.open] == ["long"]
    assert "none of 1 trials fits" in capsys.readouterr().err
    spent = Row("trial", "x", name="x", run="lab", seconds=3990.0)
    sweep._rows["x"] = spent
    left = sweep.seconds_left()
    assert left is not None
    assert 0 <= left <= 10
    assert not sweep.is_affordable(state.listed[-1], 0.0)
    sweep.close()


def test_runs_are_called_after_who_asked_first_and_found_by_what_they_are(lab: Lab, pico_data: DataFolder) -> None:
    recipe = write_recipe(pico_recipe(pico_data, lab.root), lab.folder / "recipe.toml")
    stage = TrainStage(recipe=str(recipe), steps=4)
    assert run_name(stage, "width/wide, seed 1") == f"width.wide-seed-1_{run_id(stage)[:12]}"
    assert folder_name("///", "0") == "sweep_0"
    assert run_id(stage) == run_id(stage.model_copy(update={"set": ("run.why='because'", "run.base='pico'")}))
    assert run_id(stage) != run_id(stage.model_copy(update={"processes": 2})) != run_id(stage.with_seed(7))
    command = trainer_command(recipe, 2, "n", lab.root, Asked("s/t", "why"), "pico")
    assert "--nproc_per_node=2" in command
    assert command[-4:] == ["--set", 'run.why="why"', "--set", 'run.base="pico"']
    assert "--no-ledger" in command


def test_a_recipe_is_written_as_it_was_read() -> None:
    tree = {"optim": {"groups": [{"match": "a.*", "lr": 0.1}], "on": True}, "data": {"dir": "x", "t": {"k": [1, 2]}}}
    assert tomllib.loads(as_toml(tree)) == tree

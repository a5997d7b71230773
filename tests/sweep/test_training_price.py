"""A training is priced by what is known of it, and is said to be unknown otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.ledger import Row
from pgolf_post.sweep.plan import plan_rows, show_plan
from pgolf_post.sweep.run import Sweep
from pgolf_post.sweep.settings import TrainStage
from pgolf_post.sweep.training import run_name
from pgolf_post.sweep.training_price import training_price
from tests.conftest import pico_recipe, write_recipe
from tests.sweep.conftest import Lab, spec_text


@pytest.fixture
def recipe(lab: Lab, pico_data: DataFolder) -> Path:
    return write_recipe(pico_recipe(pico_data, lab.root), lab.folder / "recipe.toml")


def final(root: Path) -> Checkpoint:
    return max(list_checkpoints(root), key=lambda checkpoint: int(checkpoint.meta["step"]))


def test_steps_cost_what_they_cost_before_and_a_cap_at_most_its_seconds(lab: Lab, recipe: Path) -> None:
    pico, device = final(lab.root), final(lab.root).meta.get("device")
    step = pico.meta["train_seconds"] / pico.meta["step"]
    price = training_price(TrainStage(recipe=str(recipe), steps=4000), lab.root, [], device)
    assert price.seconds == pytest.approx(4000 * step)
    assert price.told_by == "4,000 steps as 1 earlier runs took them"
    capped = training_price(TrainStage(recipe=str(recipe), seconds=600), lab.root, [], device)
    assert (capped.seconds, capped.told_by) == (600.0, "the recipe's cap")


@pytest.mark.parametrize("change", ["data.batch_tokens=640", "model.num_layers=7", "device"])
def test_what_other_runs_took_is_no_price(lab: Lab, recipe: Path, change: str) -> None:
    device = "another" if change == "device" else final(lab.root).meta.get("device")
    changes = () if change == "device" else (change,)
    price = training_price(TrainStage(recipe=str(recipe), steps=40, set=changes), lab.root, [], device)
    assert price.seconds is None
    assert "no earlier run" in price.told_by


def test_runs_of_the_ledger_tell_too(lab: Lab, recipe: Path, tmp_path: Path) -> None:
    settings = final(lab.root).meta["recipe"]
    rows = [
        Row(
            "run", f"run:{n}", name=str(n), settings=settings, result={"step": 10, "train_seconds": seconds}, device="x"
        )
        for n, seconds in enumerate((20.0, 30.0, 500.0))
    ]
    price = training_price(TrainStage(recipe=str(recipe), steps=7), tmp_path / "none", rows, "x")
    assert price.seconds == pytest.approx(21.0)  # the median


def test_a_plan_says_what_it_does_not_know(
    lab: Lab, recipe: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'question = "?"\nnoise_repeats = 0\n'
    lengths = {"known": "seconds = 50", "twice": "seconds = 50", "unknown": 'steps = 4, set = ["model.num_layers=7"]'}
    for name, length in lengths.items():
        text += f'[[trials]]\nname = "{name}"\ntrain = {{recipe = "{recipe}", {length}}}\n'
        text += 'codec = "brotli"\n' if name == "twice" else ""
    sweep = Sweep(lab.options(spec_text(text)))
    rows, state = plan_rows(sweep), sweep.state()
    seconds = show_plan(rows, state, "lab")
    sweep.close()
    prices = {row.listed.trial.name: row.seconds for row in rows}
    assert {name: prices[name] for name in lengths} == {"known": 50.0, "twice": 0.0, "unknown": None}
    assert seconds == sum(value or 0.0 for value in prices.values())
    told = capsys.readouterr().err
    assert "trials of unknown length" in told
    assert "the training alone is counted" in told
    assert run_name(TrainStage(recipe=str(recipe), seconds=50)).startswith("sweep_")

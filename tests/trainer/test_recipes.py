"""Every shipped recipe is strict, buildable, says where its data come from, and can happen."""

from __future__ import annotations

from pathlib import Path

import pytest

import trainer
from pgolf_post.families import on_no_device
from pgolf_post.settings import read_settings
from trainer.config import YOUNGER, Recipe
from trainer.model.architecture import GraphState
from trainer.model.gpt import GolfGPT
from trainer.model.token_kinds import reads_token_kinds
from trainer.optim.optimizer import Optimizer
from trainer.plan.preflight import preflight
from trainer.plan.timeline import group_peaks, predict
from trainer.schedule.step_times import StepTimes

RECIPES = Path(trainer.__file__).parent / "recipes"

# name: (vocabulary, parameters, (seconds of a step, and of one with all loops) on the machine that it is for)
SHIPPED: dict[str, tuple[int, int, tuple[float, float]]] = {
    "baseline_sp1024": (1024, 17_059_912, (0.0447, 0.0447)),
    "best_8xh100": (8192, 37_838_024, (0.0974, 0.1414)),
    "record_8xh100": (8192, 35_945_671, (0.0964, 0.140)),
    "single_gpu": (8192, 35_945_671, (0.771, 1.123)),
    "small_cpu": (1024, 4_600_000, (1.2, 1.8)),
    "tiny_cpu": (1024, 850_000, (0.07, 0.1)),
}


def shipped(name: str) -> Recipe:
    return read_settings(RECIPES / f"{name}.toml", Recipe)


def test_every_shipped_recipe_is_listed_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_builds_a_model_of_the_size_it_says(name: str) -> None:
    recipe, (vocab_size, expected, _) = shipped(name), SHIPPED[name]
    kinds = "9" * vocab_size if reads_token_kinds(recipe.model) else None
    graph = GraphState(active_loops=recipe.model.max_active_loops)
    with on_no_device():
        model = GolfGPT(recipe.model_config_for(vocab_size, kinds), graph)
        optimizer = Optimizer(model, recipe.optim)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(expected, rel=0.0 if expected % 1000 else 0.1)
    assert set(optimizer.learning_rates(1.0)) == group_peaks(recipe.optim, recipe.model).keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_everything_in_a_recipe_happens_on_the_machine_it_is_for(name: str) -> None:
    recipe, (_, _, times) = shipped(name), SHIPPED[name]
    timeline = predict(recipe, StepTimes(*times, "given"))
    assert timeline.never == ()
    findings = [str(finding) for finding in preflight(timeline) if finding.key != "schedule.steps"]
    assert findings == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_named_as_its_file_and_names_the_command_for_its_data(name: str) -> None:
    assert shipped(name).run.name == name
    assert "pgolf-post data " in (RECIPES / f"{name}.toml").read_text().split("[run]")[0]


def test_one_gpu_repeats_the_record_recipe_in_eight_times_the_time() -> None:
    record, single = (shipped(name).model_dump() for name in ("record_8xh100", "single_gpu"))
    for key in ("seconds", "hessian_seconds"):
        assert single["schedule"].pop(key) == 8 * record["schedule"].pop(key)
    for tree in (record, single):
        tree.pop("run")
    assert single == record


def test_a_key_that_is_off_is_not_in_what_is_hashed_of_a_recipe() -> None:
    recipe = shipped("record_8xh100")
    dumped = recipe.model_dump(mode="json")
    assert {"loss", "init", "qat", "meta_ttt"} & dumped.keys() == set()
    for table, keys in YOUNGER.items():
        assert not {*keys} & dumped.get(table, {}).keys()
    stage = {"schedule": {**dumped["schedule"], "stages": [{"at": 0.5, "batch_tokens": 1572864}]}}
    changed = Recipe.model_validate({**dumped, **stage, "optim": {**dumped["optim"], "groups": [{"match": "*"}]}})
    again = changed.model_dump(mode="json")
    assert again["schedule"]["stages"][0]["at"] == 0.5
    assert again["optim"]["groups"][0]["match"] == "*"
    assert Recipe.model_validate(again) == changed
    assert Recipe.model_validate(dumped) == recipe

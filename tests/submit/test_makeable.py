"""What no whole form does is refused by its own key, and a plain recipe is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.submit.makeable import LACKING, require_makeable
from tests.conftest import pico_recipe

PLAIN: Any = SimpleNamespace(settings={"plan": "rtn", "rules": []}, artifact="x", stats_settings=dict)
ASKED: dict[str, dict[str, Any]] = {  # what is said → tables of a recipe
    r"loss\.label_smoothing, loss\.z_loss: ": {"loss": {"z_loss": 1e-4, "label_smoothing": 0.1}},
    "init.checkpoint base: ": {"init": {"checkpoint": "base"}},
    "optim.groups: ": {"optim": {"groups": [{"match": "*", "freeze_from": 0.9}]}},
    "schedule.stages: ": {"schedule": {"stages": [{"at": 0.5, "seq_len": 8}]}},
    "meta_ttt: ": {"meta_ttt": {"every": 2, "inner_lr": 0.01}},
    "qat.plan rtn: ": {"qat": {"plan": "rtn", "at": 0.5}},
    r'model\.qk_init = "cooccurrence" starts from the training text': {"model": {"qk_init": "cooccurrence"}},
    r'model\.output_bias = "unigram" starts from the training text': {"model": {"output_bias": "unigram"}},
    "run.kernels: fused kernels ": {"run": {"kernels": "triton"}},
}


def test_a_plain_recipe_is_makeable(pico_data: DataFolder, tmp_path: Path) -> None:
    require_makeable(PLAIN, pico_recipe(pico_data, tmp_path))


@pytest.mark.parametrize("said", ASKED)
def test_what_a_script_lacks_is_refused_by_its_key(said: str, pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path, **ASKED[said])
    with pytest.raises(SettingsError, match=said) as caught:
        require_makeable(PLAIN, recipe)
    assert "--recipe" in str(caught.value.hint) or "--set" in str(caught.value.hint)


def test_every_row_is_asked_for_here() -> None:
    assert len(ASKED) == len(LACKING)


@pytest.mark.parametrize("key", ["sequential", "distill"])
def test_plans_that_read_their_text_are_refused(key: str, pico_data: DataFolder, tmp_path: Path) -> None:
    seed: Any = SimpleNamespace(settings={"plan": "own", key: {"tokens": 64}}, artifact="x")
    with pytest.raises(SettingsError, match="x: a sequential or distilled plan"):
        require_makeable(seed, pico_recipe(pico_data, tmp_path))

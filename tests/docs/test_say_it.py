"""The page of experiments: each line's keys exist, and some recipe of ours accepts the line as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pgolf_post.errors import SettingsError
from pgolf_post.settings import apply_override, parse_settings, read_toml
from trainer.architecture import ModelConfig
from trainer.config import Recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "say_it.md"
BASES: dict[str, list[str]] = {  # recipe → what the experiments' bases have beside it
    "record_8xh100": [],
    "baseline_sp1024": ["model.bigram_buckets=10240", "model.bigram_dim=128"],
    "baseline_sp1024, 11 layers": ["model.num_layers=11", "model.bigram_buckets=10240"],
}
SETTING = re.compile(r"`((?:model|data|optim|schedule)\.\w+) = ([^`]+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """Experiment → the settings that its line gives."""
    lines = [line.strip("|").split(" | ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    return {line[0].strip(): SETTING.findall(line[-1]) for line in lines if len(line) == 3}


def refusal(base: str, settings: list[tuple[str, str]]) -> str:
    """Why a recipe does not accept settings; empty if it does."""
    tree = read_toml(ROOT / "trainer" / "recipes" / f"{base.partition(',')[0]}.toml")
    for override in (*BASES[base], *(f"{key}={value}" for key, value in settings)):
        apply_override(tree, override)
    try:
        parse_settings(Recipe, tree, base)
    except SettingsError as error:
        return str(error)
    return ""


def test_the_page_has_the_experiments() -> None:
    assert len(rows()) > 50


@pytest.mark.parametrize("experiment", rows())
def test_a_line_is_accepted_by_a_recipe(experiment: str) -> None:
    settings = rows()[experiment]
    for key, _ in settings:
        table, _, leaf = key.partition(".")
        assert leaf in (
            ModelConfig.model_fields if table == "model" else Recipe.model_fields[table].annotation.model_fields
        )
    whole = [(key, value) for key, value in settings if "…" not in value]
    refusals = {base: refusal(base, whole) for base in BASES}
    assert "" in refusals.values(), refusals


def test_every_setting_of_a_part_stands_on_the_page_of_settings() -> None:
    from trainer.parts import settings_of_parts

    page = (ROOT / "docs" / "model_settings.md").read_text("utf-8")
    assert {key for key in settings_of_parts(ModelConfig) if f"`{key}`" not in page} == set()

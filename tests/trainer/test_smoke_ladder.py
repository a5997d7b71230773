"""A smoke ladder takes a recipe through every stage, keeps what passed, and stops at the rung that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.base.storage import read_json
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError, VerificationError
from pgolf_post.submit.prove import Proof
from tests.conftest import pico_recipe
from trainer import smoke
from trainer.config import Recipe


@pytest.fixture
def recipe(pico_data: DataFolder, tmp_path: Path) -> Recipe:
    return pico_recipe(pico_data, tmp_path / "checkpoints", schedule={"steps": 5000, "seconds": 600.0})


def test_a_short_recipe_is_the_recipe_but_for_its_length(recipe: Recipe) -> None:
    short = smoke.short_recipe(recipe)
    assert (short.schedule.steps, short.schedule.seconds) == (smoke.STEPS, None)
    assert (short.model, short.optim, short.data) == (recipe.model, recipe.optim, recipe.data)
    assert short.run.folder == recipe.run.checkpoint_root / "smoke" / "pico"  # where no run is the newest


def test_a_cap_in_processor_seconds_and_longer_windows_are_shortened_too(pico_data: DataFolder, tmp_path: Path) -> None:
    schedule = {"seconds": 600.0, "clock": "processor", "stages": [{"at": 0.5, "seq_len": 32}]}
    short = smoke.short_recipe(pico_recipe(pico_data, tmp_path, schedule=schedule))
    assert (short.schedule.seconds, short.schedule.clock) == (None, "wall")
    assert short.checkpoint.metric_tokens == smoke.WINDOWS * 32 + 1


def test_the_hash_ignores_seed_and_name_and_nothing_else(recipe: Recipe) -> None:
    def changed(table: str, **values: object) -> str:
        inner = getattr(recipe, table).model_copy(update=values)
        return smoke.recipe_sha256(recipe.model_copy(update={table: inner}))

    own = smoke.recipe_sha256(recipe)
    assert changed("run", seed=99, name="other") == own
    assert changed("optim", matrix_lr=0.5) != own
    assert changed("model", xsa_last_n=1) != own


@pytest.mark.slow
def test_every_rung_is_taken_and_what_passed_is_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = Proof({"nats": 1.0, "tokens": 1, "bytes": 1, "bpb": 1.0}, {}, "namespace", 1)
    monkeypatch.setattr("pgolf_post.submit.stage.proved", lambda *_: proof)  # a process of its own: tested elsewhere
    assert not smoke.has_passed(recipe)
    rows = smoke.smoke(recipe)
    assert [row["rung"] for row in rows] == ["train", "statistics", "requant", "fit", "score", "submit"]
    assert all(row["passed"] for row in rows)
    smoke.require_passed(recipe, "")
    assert not smoke.has_passed(recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"matrix_lr": 0.5})}))


@pytest.mark.parametrize("kind", [PgolfError, ZeroDivisionError])
def test_a_rung_that_fails_ends_the_ladder_and_is_kept(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def broken(_: smoke.Ladder) -> str:
        raise kind("the disk is full")

    monkeypatch.setattr(smoke.Ladder, "train", broken)
    ladder = smoke.Ladder(recipe)
    with pytest.raises(kind, match="disk is full"):
        ladder.climb()
    (row,) = read_json(smoke.smoke_path(recipe))["rungs"]
    assert (row["rung"], row["passed"], row["result"]) == ("train", False, f"{kind.__name__}: the disk is full")
    assert not smoke.has_passed(recipe)
    with pytest.raises(VerificationError, match="has not passed") as caught:
        smoke.require_passed(recipe, "python -m trainer R.toml --smoke")
    assert (caught.value.exit_code, caught.value.hint) == (4, "python -m trainer R.toml --smoke")

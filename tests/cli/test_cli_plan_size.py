"""plan-size as a command: what a ladder measures on pico runs, and the recipe that comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.stage import score
from pgolf_post.settings import read_settings
from pgolf_post.sizing import ladder as ladder_module
from pgolf_post.sizing.choose import Candidate
from pgolf_post.sizing.ladder import Ladder, LadderSettings, climb, default_sizes, step_time
from pgolf_post.sizing.law import Observation
from pgolf_post.sweep.train_stage import TrainStage
from pgolf_post.sweep.trainer_process import Asked
from pgolf_post.sweep.training import recipe_tree
from tests.conftest import pico_recipe, write_recipe
from tests.sizing.test_law import SIZES, ladder_of
from trainer.config import Recipe
from trainer.run.loop import Trainer

FIT = FitSettings(kappa="off", trellis_states=0)


@pytest.fixture
def recipe(tmp_path: Path, pico_data: DataFolder) -> Path:
    """The pico recipe as a file."""
    return write_recipe(pico_recipe(pico_data, tmp_path / "checkpoints"), tmp_path / "pico.toml")


def train_here(stage: TrainStage, root: Path, scratch: Path, asked: Asked) -> Checkpoint:
    """Train in this process: as many steps as the stage has milliseconds."""
    tree = recipe_tree(stage.model_copy(update={"seconds": None, "steps": round(1000 * (stage.seconds or 0))}))
    width = tree["model"]["model_dim"]
    tree["run"] |= {"name": f"pico_{width}_{tree['schedule']['steps']}", "checkpoint_root": str(root)}
    return Trainer(Recipe.model_validate(tree)).run()


@pytest.mark.long
def test_a_ladder_holds_what_its_runs_measured(tmp_path: Path, recipe: Path) -> None:
    sizes = (("model.model_dim=16",), ("model.model_dim=24",))
    settings = LadderSettings(recipe, sizes, (0.004, 0.002), (5.0, 7.0), None, 64, FIT)
    found = climb(settings, tmp_path / "ladder", train_here)
    assert [run.tokens for run in found.runs] == [128, 256] * 2  # 2 and 4 steps of 64 tokens
    assert [run.size for run in found.runs] == ["model_dim=16"] * 2 + ["model_dim=24"] * 2
    assert found.runs[0].parameters < found.runs[2].parameters
    longest = Checkpoint.open(next((tmp_path / "ladder" / "pico_24_4").glob("*-final")))
    data = DataFolder.open(Path(longest.meta["data_dir"]))
    assert found.runs[3].bpb == score(longest.load(), data, PlainProtocol(seq_len=16)).bpb
    per_token, start = found.candidates[1].seconds_per_token, found.candidates[1].start_seconds
    assert per_token == (found.runs[3].seconds - found.runs[2].seconds) / 128
    assert start == pytest.approx(max(0.0, found.runs[3].seconds - 256 * per_token))
    for low, high in (found.gaps[:2], found.gaps[2:]):
        assert low[0] < high[0] <= 7.0  # bits a weight, all bytes of the artifact counted
        assert low[1] > high[1] > 0


def test_the_default_sizes_are_four_widths_about_the_recipes(tmp_path: Path, recipe: Path) -> None:
    assert default_sizes(recipe) == tuple((f"model.model_dim={width}",) for width in (8, 12, 16, 20))
    wide = tmp_path / "wide.toml"
    wide.write_text("[model]\nmodel_dim = 256\nnum_heads = 4\n")
    assert default_sizes(wide) == tuple((f"model.model_dim={width}",) for width in (128, 192, 256, 320))
    wide.write_text("[model]\nmodel_dim = 128\nnum_heads = 4\n")
    assert default_sizes(wide) == tuple((f"model.model_dim={width}",) for width in (64, 96, 128, 160))
    wide.write_text("[model]\nmodel_dim = 12\nnum_heads = 4\n")
    with pytest.raises(SettingsError, match="has no four widths about it"):
        default_sizes(wide)


def test_seconds_a_token_leave_the_start_of_a_run_out() -> None:
    runs = [Observation("a", 1, tokens, 4.0 + 0.01 * tokens, 1.0) for tokens in (100, 400)]
    assert step_time(runs) == pytest.approx((0.01, 4.0))
    with pytest.raises(MismatchError, match="tells no seconds a token"):
        step_time([runs[0], replace(runs[0], seconds=9.0)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[LadderSettings]:
    """A ladder as if measured, from known laws; collects the settings that it was asked for."""
    asked: list[LadderSettings] = []

    def told(settings: LadderSettings, root: Path) -> Ladder:
        asked.append(settings)
        names = dict(zip(SIZES, [", ".join(c.removeprefix("model.") for c in s) for s in settings.sizes], strict=True))
        runs = tuple(replace(run, size=names[run.parameters]) for run in ladder_of())
        gaps = tuple((bits, 0.5 * 2.0 ** (-2 * bits)) for bits in settings.bits)
        return Ladder(runs, gaps, tuple(Candidate(names[size], size, size, 1e-10 * size) for size in SIZES))

    monkeypatch.setattr(ladder_module, "climb", told)
    return asked


def test_the_command_writes_the_recipe_of_the_best_size(
    tmp_path: Path, recipe: Path, pgolf: Any, measured: list[LadderSettings]
) -> None:
    out = tmp_path / "best.toml"
    answer = pgolf("plan-size", recipe, "--budget", 2_000_000, "--seconds", 3000, "--out", out, "--json")
    facts = json.loads(answer.out.splitlines()[-1])
    assert measured[0].seconds == (75.0, 300.0)
    assert facts["loss"]["alpha"] == pytest.approx(0.35, abs=1e-3)
    assert [size["bpb"] for size in facts["sizes"]] == sorted(size["bpb"] for size in facts["sizes"])
    written = read_settings(out, Recipe)
    assert f"model_dim={written.model.model_dim}" == facts["sizes"][0]["name"]
    assert (written.schedule.seconds, written.schedule.steps) == (3000, None)
    assert facts["recipe"] == out.read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--size", "model.model_dim=8", "--size", "model.model_dim=16"), 1, "the ladder has 2 sizes"),
        (("--lengths", "0.1"), 1, "no size of the ladder has runs of two lengths"),
        (("--lengths", "0.1,x"), 2, "numbers with commas between"),
        (("--bits", "3,3"), 2, "3,3: numbers above 0, each once"),
        (("--bits", "nan,2"), 2, "'nan,2': expected numbers with commas between them"),
        (("--lengths", "0.1,inf"), 2, "'0.1,inf': expected numbers with commas between them"),
        (("--out", "pico.toml/best.toml"), 1, "could not write pico.toml/best.toml"),
        (("--out", "."), 2, "is a directory"),
    ],
)
def test_a_ladder_that_can_say_nothing_is_refused_before_it_is_trained(
    recipe: Path,
    pgolf: Any,
    measured: list[LadderSettings],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(recipe.parent)
    answer = pgolf("plan-size", recipe, "--budget", 2_000_000, "--seconds", 3000, *words)
    assert answer.code == code
    assert said in answer.err
    assert measured == []

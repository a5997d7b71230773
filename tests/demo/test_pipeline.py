"""The demo, whole and for real, with a few training steps and little text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import default_checkpoint
from pgolf_post.cli.demo import write_page
from pgolf_post.data import DataFolder
from pgolf_post.data.stdlib_corpus import stdlib_documents
from pgolf_post.demo import pipeline
from pgolf_post.demo.pipeline import Demo
from pgolf_post.demo.report import NEXT, show
from pgolf_post.errors import SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.settings import read_settings
from tests.docs.test_pages import unknown_words
from trainer.config import Recipe

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "trainer" / "recipes" / "tiny_cpu.toml"
FEW_STEPS = ("schedule.steps=8", "optim.momentum_warmup_steps=2", "checkpoint.metric_tokens=1024")
SMALL = ("model.num_layers=2", "model.loop_end=1", "model.model_dim=64", "model.rope_dims=8", "model.xsa_last_n=2")
NUM_DOCUMENTS = 400  # of the standard library's
LITTLE_TEXT = CalibrationSettings(tokens=2048, fisher=True)
QUICK_FIT = FitSettings(trellis_states=4, kappa="role", kappa_tokens=1024)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo's folder, while its text is the first part of the standard library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "stdlib_documents", lambda: islice(stdlib_documents(), NUM_DOCUMENTS))
        yield tmp_path_factory.mktemp("demo")


def run_demo(root: Path) -> dict[str, Any]:
    return Demo(root, (*FEW_STEPS, *SMALL), LITTLE_TEXT, QUICK_FIT, score_tokens=2048).run()


@pytest.fixture(scope="module")
def answer(root: Path) -> dict[str, Any]:
    return run_demo(root)


def all_rows(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*answer["rows"], *answer["more_rows"]]


def test_rows_are_real_artifacts(answer: dict[str, Any], root: Path) -> None:
    for row in all_rows(answer):
        assert Path(row["artifact"]).stat().st_size == row["artifact_bytes"]
        assert row["measured_gap_bpb"] == pytest.approx(row["bpb"] - answer["pre_quant_bpb"], abs=1e-9)
        assert row["measured_gap_low_bpb"] < row["measured_gap_bpb"] < row["measured_gap_high_bpb"]
    fitted = answer["rows"][-1]
    assert read_artifact(Path(fitted["artifact"])).manifest["symbols_sha256"] == fitted["symbols_sha256"]
    assert len({row["symbols_sha256"] for row in all_rows(answer)}) == 8
    assert default_checkpoint(root / "checkpoints").view_id() == answer["checkpoint_id"]


def test_gaps_are_expected_by_the_checkpoint_and_an_average_of_others_is_measured(answer: dict[str, Any]) -> None:
    *own, blend = all_rows(answer)
    assert all(row["gap_bpb"] > 0 and row["gap_half_bpb"] < row["gap_bpb"] for row in own)  # a divergence
    assert answer["rows"][-1]["gap_bpb"] == min(row["gap_bpb"] for row in answer["rows"])
    assert "gap_bpb" not in blend
    assert blend["checkpoint_id"] != answer["checkpoint_id"]


def test_four_quantizers_take_the_record_recipes_bytes_or_a_little_less(answer: dict[str, Any]) -> None:
    limit, rows = answer["equal_bytes"], answer["rows"]
    assert [row["name"] for row in rows] == ["round to nearest", "GPTQ with SDClip", "record recipe", "fit"]
    assert rows[2]["artifact_bytes"] == limit
    assert rows[2]["command"] == "pgolf-post requant --plan record-1855"  # as published
    clipped, fitted = [row["artifact_bytes"] for row in rows[:2]], rows[3]["artifact_bytes"]
    assert all(0.999 * limit <= num_bytes <= limit for num_bytes in clipped)
    assert limit - 2000 <= fitted <= limit


@pytest.mark.long
def test_a_second_demo_gets_the_same_numbers(answer: dict[str, Any], root: Path) -> None:
    second = run_demo(root)
    differ = ("seconds", "artifact", "command")  # the last two name the run's folder
    numbers, again = (
        [{key: value for key, value in row.items() if key not in differ} for row in all_rows(one)]
        for one in (answer, second)
    )
    assert numbers == again
    assert answer["checkpoint"] != second["checkpoint"]
    for key in ("pre_quant_bpb", "byte_ngram_bpb", "equal_bytes", "tokens"):
        assert answer[key] == second[key]


def test_training_ends_by_steps_and_not_by_the_clock() -> None:
    recipe = read_settings(RECIPE, Recipe)
    assert recipe.schedule.steps
    assert recipe.schedule.seconds is None
    assert recipe.checkpoint.every_seconds is None


def test_only_the_final_checkpoint_is_scored(answer: dict[str, Any]) -> None:
    run = Path(answer["checkpoint"]).parent
    scored = [path.name for path in run.glob("step_*") if '"bpb"' in (path / "meta.json").read_text("utf-8")]
    assert scored == [Path(answer["checkpoint"]).name]


def test_the_closing_tables_fit_80_columns(answer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show(answer, seconds=1.0)
    printed = capsys.readouterr().err
    for row in all_rows(answer):
        assert re.search(rf"{re.escape(row['name'])} +{row['artifact_bytes']:,}  {row['bpb']:.5f}  ", printed)
    assert max(len(line) for line in printed.splitlines() if re.search(r"  \d\.\d{5}  ", line)) <= 80
    assert f"within {answer['equal_bytes']:,} bytes" in printed


def test_it_ends_with_a_page_about_its_run(
    answer: dict[str, Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write_page(root, Path(answer["checkpoint"]).parent)
    assert page.as_uri() in capsys.readouterr().err
    html = page.read_text()
    for row in all_rows(answer):
        assert f"{row['artifact_bytes']:,}" in html
    assert all(f'id="{name}"' in html for name in ("runs", "checkpoints", "artifacts", "bytes", "lineage"))


def test_the_next_commands_exist() -> None:
    commands = [line.strip().removeprefix("pgolf-post ") for line in NEXT if "pgolf-post" in line]
    assert [command.split()[0] for command in commands] == ["import", "fit"]
    assert [unknown_words(command) for command in commands] == [[], []]


def test_training_that_fails_ends_the_demo_as_the_trainer_ends(tmp_path: Path, pico_data: DataFolder) -> None:
    with pytest.raises(SettingsError, match="training failed"):
        Demo(tmp_path, ("model.no_such_key=1",)).train(pico_data)
    assert not (tmp_path / "checkpoints").exists()

"""Stages of batch tokens and windows: the right text, the right counts, exact resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.curves.reading import read_log
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.settings import parse_settings
from pgolf_post.submit.makeable import require_makeable
from tests.conftest import pico_recipe
from tests.trainer.test_distributed import farthest, recipe_file, recipe_of, train
from trainer.config import Recipe
from trainer.plan.costs import Wanted, costs_of
from trainer.plan.dry_run import answer, dry_run
from trainer.plan.timeline import predict
from trainer.run.background import BackgroundWriter
from trainer.run.loop import Trainer
from trainer.run.saving import save
from trainer.run.warm_up import shapes_ahead
from trainer.schedule.stages import Stage, StagePlace, stage_at
from trainer.schedule.step_times import StepTimes
from trainer.step.batches import WindowSampler
from trainer.step.gradients import micro_batch_tokens
from trainer.step.staged_batches import StagedSampler

STAGES = [{"at": 0.25, "batch_tokens": 128}, {"at": 0.5, "batch_tokens": 96, "seq_len": 32}, {"at": 0.75, "seq_len": 8}]
TABLES: dict[str, dict[str, object]] = {
    "schedule": {"stages": STAGES},
    "checkpoint": {"steps": [3, 5, 8, 9], "metric": "final", "metric_tokens": 40},
}
SIZES = [64] * 3 + [128] * 3 + [96] * 6  # of twelve steps


def positions(data: DataFolder, place: StagePlace, steps: range, longest: int) -> list[tuple[int, ...]]:
    """Inputs of all windows of some steps, as tuples."""
    stage = place.stage
    sampler = StagedSampler(data, place, longest, seed=7)
    windows = stage.batch_tokens // stage.seq_len
    return [
        tuple(window.tolist())
        for step in steps
        for inputs, _ in sampler.step_batches(step, windows, windows)
        for window in inputs
    ]


def test_the_first_stage_and_one_that_changes_nothing_read_what_a_run_without_stages_reads(
    pico_data: DataFolder,
) -> None:
    plain = WindowSampler(pico_data, 16, seed=7)
    first = StagePlace(Stage(0.0, 64, 16))
    again = first.enter(Stage(0.5, 64, 16), step=5, longest=16)
    for step in range(8):
        place = first if step < 5 else again
        ours = list(StagedSampler(pico_data, place, 16, 7).step_batches(step, 4, 2))
        for (inputs, targets), theirs in zip(ours, plain.step_batches(step, 4, 2), strict=True):
            assert torch.equal(inputs, theirs[0])
            assert torch.equal(targets, theirs[1])


def test_no_stage_reads_what_another_has_read_and_windows_lie_in_the_text(pico_data: DataFolder) -> None:
    place, longest, covered = StagePlace(Stage(0.0, 64, 16)), 32, []
    steps = {0: Stage(0.0, 64, 16), 3: Stage(0.25, 128, 16), 6: Stage(0.5, 96, 32), 9: Stage(0.75, 96, 8)}
    whole = WindowSampler(pico_data, longest, 7)
    for step in range(12):
        if step and step in steps:
            place = place.enter(steps[step], step, longest)
        begins, seq_len = place.token(step), place.stage.seq_len
        for number, window in enumerate(positions(pico_data, place, range(step, step + 1), longest)):
            block, within = divmod(begins + number * seq_len, longest)
            assert list(window) == whole.window(block)[within : within + seq_len].tolist()
            covered += range(begins + number * seq_len, begins + (number + 1) * seq_len)
    assert len(covered) == len(set(covered)) == sum(SIZES) == place.tokens_seen(12)
    assert max(covered) + 1 - len(covered) < 3 * longest  # what was left out to begin at whole windows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Path:
    """A run of twelve steps in four stages."""
    root = tmp_path_factory.mktemp("stages")
    Trainer(pico_recipe(pico_data, root, **TABLES)).run()
    return root / "pico"


@pytest.mark.slow
def test_a_run_counts_its_tokens_and_its_loss_is_the_mean_of_its_windows(whole: Path, pico_data: DataFolder) -> None:
    found = {checkpoint.meta["step"]: checkpoint for checkpoint in map(Checkpoint.open, whole.glob("step_*"))}
    assert {step: found[step].meta["tokens_seen"] for step in (3, 5, 8, 9, 12)} == {
        step: sum(SIZES[:step]) for step in (3, 5, 8, 9, 12)
    }
    assert found[12].config["model"]["train_seq_len"] == 32
    trainer = Trainer(pico_recipe(pico_data, whole.parent / "other", **TABLES))
    trainer.resume(found[8].path)
    place = StagePlace(Stage(0.0, 64, 16)).enter(Stage(0.25, 128, 16), 3, 32).enter(Stage(0.5, 96, 32), 6, 32)
    assert trainer.state.place == place
    (inputs, targets), *rest = StagedSampler(pico_data, place, 32, 7).step_batches(8, 3, 3)
    with torch.no_grad():
        nats = float(trainer.gradients.loss(inputs, targets))
    log = [json.loads(line) for line in (whole / "train.jsonl").read_text().splitlines()]
    assert log[8]["loss"] == pytest.approx(nats, abs=2e-6)
    assert not rest
    tokens = read_log(whole).curve("train_loss").along("tokens")
    assert tokens.tolist() == [sum(SIZES[: step + 1]) for step in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 8])  # where a stage begins, and amid two
def test_a_run_resumed_in_a_stage_changes_no_bit(step: int, tmp_path: Path, pico_data: DataFolder, whole: Path) -> None:
    resumed = Trainer(pico_recipe(pico_data, tmp_path, **TABLES))
    resumed.resume(next(whole.glob(f"step_{step:06d}-*")))
    final = Checkpoint.open(next(whole.glob("*-final")))
    ours = resumed.run()
    assert [ours.view_id(view) for view in ("raw", "ema")] == [final.view_id(view) for view in ("raw", "ema")]
    assert ours.meta["tokens_seen"] == final.meta["tokens_seen"]


@pytest.mark.slow
def test_a_checkpoint_of_other_stages_is_not_resumed(tmp_path: Path, pico_data: DataFolder, whole: Path) -> None:
    middle = next(whole.glob("step_000008-*"))
    for stages in ([], STAGES[:2]):
        trainer = Trainer(pico_recipe(pico_data, tmp_path, schedule={"stages": stages}))
        with pytest.raises(MismatchError, match=r"schedule.stages are 0.25: 128 × None, .* there|train_seq_len"):
            trainer.resume(middle)


@pytest.mark.slow
def test_a_stage_that_changes_nothing_changes_no_bit(tmp_path: Path, pico_data: DataFolder, pico_run: Path) -> None:
    same = Trainer(pico_recipe(pico_data, tmp_path, schedule={"stages": [{"at": 0.5, "batch_tokens": 64}]})).run()
    assert same.view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")
    assert same.meta["tokens_seen"] == 12 * 64


def test_a_checkpoint_before_the_first_step_goes_on_in_the_recipes_own_stage(
    tmp_path: Path, pico_data: DataFolder
) -> None:
    there = Trainer(pico_recipe(pico_data, tmp_path / "there", schedule={"stages": STAGES[:1]}))
    with BackgroundWriter(0) as writer:
        path = save(there.state, writer, "init")
    here = Trainer(pico_recipe(pico_data, tmp_path / "here", data={"batch_tokens": 96}))
    here.resume(path)
    here.timed_step(0.0)
    assert here.state.tokens_seen == 96


def test_the_warm_up_has_the_stage_that_the_next_step_enters(tmp_path: Path, pico_data: DataFolder) -> None:
    state = Trainer(pico_recipe(pico_data, tmp_path, **TABLES)).state
    assert shapes_ahead(state) == [(4, 16), (8, 16), (3, 32), (12, 8)]
    state.step = 6  # as it stands when it was stopped right before its third stage, or is told of lost seconds
    assert shapes_ahead(state) == [(3, 32), (12, 8)]


@pytest.mark.long  # processes of torchrun
def test_two_processes_are_one_process(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "one", pico_data, "fp64")
    stages = [{"at": 0.3, "batch_tokens": 192}, {"at": 0.6, "seq_len": 8}]
    tree = recipe.model_dump(exclude_none=True)
    tree["schedule"]["stages"] = stages
    one = Trainer(Recipe.model_validate(tree)).run()
    words = "schedule.stages=[{at = 0.3, batch_tokens = 192}, {at = 0.6, seq_len = 8}]"
    two = train(2, recipe_file(tmp_path / "two", pico_data, "fp64"), "--set", words)
    assert one.meta["tokens_seen"] == two.meta["tokens_seen"] > 20 * 96
    assert farthest(one, two) < 1e-9


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ([{"at": 0.0, "seq_len": 8}], "stages.0.at = 0.0: .*greater than 0"),
        ([{"at": 1.0, "seq_len": 8}], "stages.0.at = 1.0: .*less than 1"),
        ([{"at": 0.5}], "the stage at 0.5 changes nothing"),
        ([{"at": 0.5, "seq_len": 8}, {"at": 0.4, "seq_len": 16}], "stage 2 is at progress 0.4, stage 1 at 0.5"),
        ([{"at": 0.5, "batch_tokens": 72}], "at 0.5: batch_tokens 72 must be a multiple .* of seq_len 16"),
        ([{"at": 0.5, "seq_len": 24, "batch_tokens": 48}], "seq_len 16 at 0 does not divide the longest, 24"),
    ],
)
def test_a_stage_that_divides_badly_is_refused(
    stages: list[dict[str, Any]], named: str, tmp_path: Path, pico_data: DataFolder
) -> None:
    tree = pico_recipe(pico_data, tmp_path).model_dump(exclude_none=True)
    tree["schedule"]["stages"] = stages
    with pytest.raises(SettingsError, match=named):
        parse_settings(Recipe, tree, "recipe")


def test_a_stage_that_ranks_cannot_share_is_refused(tmp_path: Path, pico_data: DataFolder) -> None:
    recipe = pico_recipe(pico_data, tmp_path, schedule={"stages": [{"at": 0.5, "batch_tokens": 48}]})
    assert micro_batch_tokens(recipe, 2) == 32
    with pytest.raises(SettingsError, match=r"schedule.stages at 0.5: batch_tokens 48 cannot be shared by 2 ranks"):
        micro_batch_tokens(recipe, 2, recipe.stages[1])


def test_the_dry_run_counts_tokens_seconds_and_flops_by_stage(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico_recipe(pico_data, tmp_path, schedule={"stages": STAGES}, model={"num_loops": 0})
    found = dry_run(recipe, StepTimes(1.0, 1.0, "given"))
    rows = {row.phase: row for row in found.timeline.boundaries}
    assert [rows[f"stage@{at:g}"].step for at in (0.25, 0.5, 0.75)] == [3, 6, 9]
    assert answer(found)["tokens"] == sum(SIZES)
    said = (
        "in proportion to tokens in later stages (128 tokens from 0.25 on, 96 tokens from 0.5 on, 96 tokens from 0.75"
    )
    assert said in " ".join(capsys.readouterr().err.split())
    assert found.timeline.seconds == pytest.approx(sum(SIZES) / 64)
    assert [found.timeline.clock.tokens(step) for step in range(13)] == [sum(SIZES[:step]) for step in range(13)]
    assert [stage_at(recipe.stages, at).seq_len for at in (0.0, 0.3, 0.5, 0.9)] == [16, 16, 32, 8]

    # FLOPs are those of four runs of one stage each
    total, costs = 0.0, costs_of(found.timeline, Wanted())
    for stage, steps in zip(recipe.stages, (3, 3, 3, 3), strict=True):
        data = {"batch_tokens": stage.batch_tokens, "seq_len": stage.seq_len}
        part = pico_recipe(pico_data, tmp_path, data=data, schedule={"steps": steps}, model={"num_loops": 0})
        each = costs_of(predict(part, StepTimes(1.0, 1.0, "given")), Wanted())
        total += each.flops if each else 0.0
    assert costs is not None
    assert costs.flops == pytest.approx(total)
    late = pico_recipe(pico_data, tmp_path, schedule={"stages": [{"at": 0.99, "seq_len": 8}]})
    refused = [f.key for f in dry_run(late, StepTimes(0.5, 1.0, "given")).findings if f.level == "refuse"]
    assert refused == ["schedule.stages"]


def test_a_script_that_trains_refuses_stages(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path, schedule={"stages": STAGES})
    seed: Any = SimpleNamespace(settings={"plan": "rtn", "rules": []}, artifact="x")
    with pytest.raises(SettingsError, match=r"schedule.stages: a script that trains has steps and windows of one size"):
        require_makeable(seed, recipe)

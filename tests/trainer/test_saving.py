"""Checkpoints written while training goes on: what they hold, when they are scored, what happens when one fails."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.run.saving
from pgolf_post.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError, PgolfError
from pgolf_post.score.metric import verify_metric
from tests.conftest import pico_recipe
from trainer.run.loop import Trainer
from trainer.run.state import RunState

pytestmark = pytest.mark.slow

EVERY_STEP = {"steps": list(range(13)), "fractions": (), "metric_tokens": 40}


def metrics_of(root: Path) -> list[bool]:
    """Whether each checkpoint's views carry a metric, in step order."""
    views = [c.meta["views"].values() for c in list_checkpoints(root)]
    return [all(view["metric"] for view in found) for found in views]


@pytest.mark.parametrize("max_in_flight", [0, 1, 40])
def test_a_folder_holds_its_own_moment_however_late_it_is_written(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch, max_in_flight: int
) -> None:
    settings = {**EVERY_STEP, "max_in_flight": max_in_flight}
    trainer_, seen = Trainer(pico_recipe(pico_data, tmp_path, checkpoint=settings)), {}
    gate = threading.Event()
    take = trainer.run.saving.prepare_checkpoint

    def noted(running: RunState, *rest: Any) -> Any:
        seen[running.step] = running.model.tok_emb.weight.detach().clone()
        if running.step == 12 or max_in_flight < 40:
            gate.set()
        return take(running, *rest)

    def late(*arguments: Any) -> Checkpoint:
        gate.wait()  # with room for all, nothing is written before training is over
        return save_checkpoint(*arguments)

    monkeypatch.setattr(trainer.run.saving, "prepare_checkpoint", noted)
    monkeypatch.setattr(trainer.run.saving, "save_checkpoint", late)
    trainer_.run()
    found = list_checkpoints(tmp_path)
    assert [c.meta["step"] for c in found] == sorted(seen)
    for checkpoint in found:
        assert torch.equal(checkpoint.load("raw").tensors["tok_emb.weight"], seen[checkpoint.meta["step"]])


def test_the_run_ends_with_all_on_disk_and_says_how_long_it_stood_still(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    final = Trainer(pico_recipe(pico_data, tmp_path, checkpoint=EVERY_STEP)).run()
    assert not list(tmp_path.rglob(".tmp-*"))
    waits = [c.meta["checkpoint_waits"] for c in list_checkpoints(tmp_path)]
    assert all(set(w) == {"scoring_seconds", "snapshot_seconds", "waited_seconds"} for w in waits)
    assert sorted(w["scoring_seconds"] for w in waits) == [w["scoring_seconds"] for w in waits]  # cumulative
    assert waits[-1]["scoring_seconds"] > 0
    log = [json.loads(line) for line in (final.path.parent / "train.jsonl").read_text().splitlines()]
    assert log[-1]["scoring_seconds"] <= final.meta["checkpoint_waits"]["scoring_seconds"]
    assert "s for scoring, " in capsys.readouterr().err.splitlines()[-1]


def test_a_resumed_run_counts_on(tmp_path: Path, pico_data: DataFolder, pico_run: Path) -> None:
    middle = Checkpoint.open(next(pico_run.glob("pico/*frac75")))
    resumed = Trainer(pico_recipe(pico_data, tmp_path))
    resumed.resume(middle.path)
    assert resumed.state.waits.record() == middle.meta["checkpoint_waits"]


@pytest.mark.parametrize(("metric", "before_the_end", "after"), [("each", 5, 5), ("end", 0, 5), ("final", 1, 1)])
def test_views_are_scored_when_the_recipe_says(
    tmp_path: Path,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    before_the_end: int,
    after: int,
) -> None:
    counts, score_saved = [], trainer.run.saving.score_saved

    def counted(running: RunState) -> None:
        counts.append(sum(metrics_of(tmp_path)))
        score_saved(running)

    monkeypatch.setattr("trainer.run.loop.score_saved", counted)
    final = Trainer(pico_recipe(pico_data, tmp_path, checkpoint={"metric": metric})).run()
    assert counts == ([before_the_end] if metric == "end" else [])
    assert sum(metrics_of(tmp_path)) == after
    assert metrics_of(tmp_path)[-1]
    assert final.meta["views"]["raw"]["metric"]["nats"] > 0


def test_a_metric_measured_at_the_end_is_the_one_measured_at_once(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path
) -> None:
    Trainer(pico_recipe(pico_data, tmp_path / "end", checkpoint={"metric": "end"})).run()
    for late, early in zip(list_checkpoints(tmp_path / "end"), list_checkpoints(pico_run), strict=True):
        for name in ("raw", "ema"):
            assert late.view_id(name) == early.view_id(name)
            ours, theirs = (c.meta["views"][name]["metric"] for c in (late, early))
            assert ours["nats"] == pytest.approx(theirs["nats"], abs=1e-5 * ours["tokens"])
            assert {**ours, "nats": 0, "bpb": 0} == {**theirs, "nats": 0, "bpb": 0}
            assert verify_metric(late.load(name), pico_data).passed


def test_a_write_that_fails_ends_the_run_and_leaves_what_was_saved(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, *rest: Any) -> Checkpoint:
        if "warmdown" in path.name:
            raise PgolfError(f"could not write {path}: no space left")
        return save_checkpoint(path, *rest)

    monkeypatch.setattr(trainer.run.saving, "save_checkpoint", full_disk)
    running = Trainer(pico_recipe(pico_data, tmp_path, schedule={"steps": 4000, "warmdown": 0.999}))
    with pytest.raises(PgolfError, match=r"could not write .*warmdown_start: no space left"):
        running.run()
    assert running.state.step < 4000  # at a next step, not at the end
    assert [c.meta["phase"] for c in list_checkpoints(tmp_path)] == ["init", "momentum_warmup_done"]
    assert Checkpoint.open(tmp_path / "latest").meta["step"] == 3


def test_a_failing_run_keeps_the_checkpoints_it_had_handed_over(tmp_path: Path, pico_data: DataFolder) -> None:
    running = Trainer(pico_recipe(pico_data, tmp_path))

    def broken(_: float) -> tuple[float, float]:
        raise NumericsError("training loss is nan")

    running.timed_step = broken  # type: ignore[method-assign]
    with pytest.raises(NumericsError):
        running.run()
    assert Checkpoint.open(tmp_path / "latest").load("raw").tensors


def test_copies_for_the_writer_share_no_memory_with_the_model() -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"whole": base, "transposed": base.T, "number": torch.tensor(3.0), "empty": torch.zeros(0, 2)}
    copies = trainer.run.saving.host_copies(tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    base.zero_()
    for name, copy in copies.items():
        assert torch.equal(copy, expected[name])
        assert copy.is_contiguous()

"""A run: its folders, its data order, and that stopping and resuming changes no bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, NumericsError, PgolfError
from tests.conftest import pico_recipe
from trainer.batches import WindowSampler
from trainer.loop import Trainer


def test_a_run_leaves_a_complete_folder_at_every_phase_boundary(pico_run: Path) -> None:
    found = list_checkpoints(pico_run)
    assert [checkpoint.path.name for checkpoint in found] == [
        "step_000000-init",
        "step_000003-momentum_warmup_done+loops_on",
        "step_000006-warmdown_start",
        "step_000009-frac75",
        "step_000012-final",
    ]
    assert [checkpoint.config["graph"]["active_loops"] for checkpoint in found] == [0, 1, 1, 1, 1]
    for checkpoint in found:
        assert set(checkpoint.meta["views"]) == {"raw", "ema"}
        metric = checkpoint.meta["views"]["raw"]["metric"]
        assert metric["nats"] > 0
        assert isinstance(metric["tokens"], int)
        assert isinstance(metric["bytes"], int)
    assert (pico_run / "latest").resolve() == found[-1].path.resolve()


def test_meta_says_where_a_checkpoint_came_from(pico_checkpoint: Checkpoint) -> None:
    wanted = {"id", "kind", "phase", "step", "tokens_seen", "train_seconds", "seed", "data_position", "rng", "parents"}
    wanted |= {"git", "versions", "device", "argv", "recipe", "data_dir"}
    assert wanted <= pico_checkpoint.meta.keys()
    assert pico_checkpoint.meta["tokens_seen"] == 12 * 64


def test_training_learns(pico_run: Path) -> None:
    first, *_, last = list_checkpoints(pico_run)
    nats = [c.meta["views"]["raw"]["metric"]["nats"] for c in (first, last)]
    assert nats[1] < nats[0]


def test_same_seed_same_weights_other_seed_other_weights(tmp_path: Path, pico_data: DataFolder, pico_run: Path) -> None:
    again = Trainer(pico_recipe(pico_data, tmp_path / "again")).run()
    assert again.view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")
    other = Trainer(pico_recipe(pico_data, tmp_path / "other", run={"seed": 8})).run()
    assert other.view_id("raw") != again.view_id("raw")


@pytest.mark.parametrize("phase", ["warmdown_start", "frac75"])
def test_resuming_changes_no_bit(tmp_path: Path, pico_data: DataFolder, pico_run: Path, phase: str) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path / "resumed"))
    trainer.resume(next(pico_run.glob(f"pico/*{phase}")))
    resumed, whole = trainer.run(), Checkpoint.open(pico_run / "latest")
    assert resumed.view_id("raw") == whole.view_id("raw")
    assert resumed.view_id("ema") == whole.view_id("ema")
    assert resumed.meta["parents"] == [Checkpoint.open(next(pico_run.glob(f"pico/*{phase}"))).view_id("raw")]


def test_resume_needs_the_same_model_and_the_optimizer_state(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path
) -> None:
    middle = next(pico_run.glob("pico/*frac75"))
    with pytest.raises(MismatchError, match="cannot be resumed"):
        Trainer(pico_recipe(pico_data, tmp_path / "a", model={"num_layers": 4})).resume(middle)
    (middle / "training.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"training\.safetensors"):
        Trainer(pico_recipe(pico_data, tmp_path / "b")).resume(middle)


def test_a_run_never_overwrites_another(pico_data: DataFolder, pico_run: Path) -> None:
    with pytest.raises(PgolfError, match="never overwrites"):
        Trainer(pico_recipe(pico_data, pico_run)).run()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_checkpoints_intact(
    tmp_path: Path, pico_data: DataFolder
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path))
    with torch.no_grad():
        trainer.model.blocks[0].mlp.proj.weight.fill_(float("nan"))
    trainer.phases.pending.pop("init")
    with pytest.raises(NumericsError, match="training loss is nan at step 0"):
        trainer.run()


def test_gradient_accumulation_is_the_same_step(tmp_path: Path, pico_data: DataFolder) -> None:
    gradients = []
    for name, micro_tokens in (("whole", 64), ("parts", 16)):
        data = {"micro_batch_tokens": micro_tokens}
        trainer = Trainer(pico_recipe(pico_data, tmp_path / name, data=data))
        trainer._accumulate_gradients()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_data_order_is_a_function_of_seed_and_step(pico_data: DataFolder) -> None:
    samplers = [WindowSampler(pico_data, 16, seed) for seed in (1, 1, 2)]
    list(samplers[1].step_batches(0, 4, 2))  # having been asked before changes nothing
    batches = [torch.cat([inputs for inputs, _ in sampler.step_batches(5, 4, 2)]) for sampler in samplers]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_an_epoch_visits_every_window_once(pico_data: DataFolder) -> None:
    sampler = WindowSampler(pico_data, 16, seed=3)
    visited = [sampler._window_at(position) for position in range(2 * sampler.num_windows)]
    epochs = visited[: sampler.num_windows], visited[sampler.num_windows :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(sampler.num_windows))
    assert epochs[0] != epochs[1]


def test_targets_are_the_next_tokens(pico_data: DataFolder) -> None:
    inputs, targets = next(WindowSampler(pico_data, 16, seed=4).step_batches(0, 2, 2))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_log_is_one_json_object_per_step(pico_run: Path) -> None:
    lines = (pico_run / "pico" / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert {"loss", "grad_norm", "lr_multiplier", "tokens_per_second", "train_seconds"} <= records[0].keys()

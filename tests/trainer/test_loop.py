"""A run: its folders, its data order, and that stopping and resuming changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, NumericsError, PgolfError
from tests.conftest import pico_recipe
from trainer.run.log import StepClock
from trainer.run.loop import Trainer
from trainer.step.batches import WindowSampler

pytestmark = pytest.mark.slow

EVERYTHING: dict[str, dict[str, Any]] = {  # that a resumed run must take up where it was
    "model": {
        "num_loops": 2,
        "mlp_mult": [2.0, 1.5, 0.0],
        "xsa_alpha": 0.9,
        "pass_embeddings": "visit",
        "pass_norm": True,
        "value_residual": True,
        "value_residual_from": "previous",
        "value_x0_layers": [2],
        "bigram_buckets": 32,
        "bigram_classes": "word_position",
        "bigram_heads": 2,
        "word_start_boost": True,
        "trigram_buckets": 16,
        "token_type_dim": 4,
        "output_bias": "unigram",
        "head_residual_rank": 2,
        "qk_init": "cooccurrence",
    },
    "optim": {"ema_every": 2, "swa_start": 0.25, "swa_every": 2, "momentum_cycle_steps": 5},
    "schedule": {"shape": "tidal", "all_loops_at": 0.6, "weight_decay_taper_at": 0.4},
    "checkpoint": {"steps": list(range(13)), "metric_tokens": 40},
}


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


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Path:
    """The folder of a run with every average and curriculum on, a checkpoint after every step."""
    root = tmp_path_factory.mktemp("everything")
    Trainer(pico_recipe(pico_data, root, **EVERYTHING)).run()
    return root / "pico"


@pytest.mark.parametrize("step", [1, 3, 9])  # before the running mean, where it starts, amid it
def test_resuming_with_every_average_and_curriculum_changes_no_bit(
    tmp_path: Path, pico_data: DataFolder, whole_run: Path, step: int
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path / "resumed", **EVERYTHING))
    start = next(whole_run.glob(f"step_{step:06d}-*"))
    trainer.resume(start)
    resumed, whole = trainer.run(), Checkpoint.open(next(whole_run.glob("*-final")))
    assert set(resumed.meta["views"]) == {"raw", "ema", "swa"}
    assert {name: resumed.view_id(name) for name in ("raw", "ema", "swa")} == {
        name: whole.view_id(name) for name in ("raw", "ema", "swa")
    }
    assert resumed.meta["swa_count"] == whole.meta["swa_count"] == 5  # after steps 4, 6, 8, 10 and 12
    assert resumed.meta["wall_seconds"] > Checkpoint.open(start).meta["wall_seconds"]


def test_the_running_mean_is_the_mean_of_the_raw_weights_and_a_view_of_its_own(whole_run: Path) -> None:
    found = [Checkpoint.open(path) for path in sorted(whole_run.glob("step_*"))]
    assert [checkpoint.meta["swa_count"] for checkpoint in found] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert ["swa" in checkpoint.meta["views"] for checkpoint in found] == [False] * 4 + [True] * 9
    raw = [found[step].load("raw").tensors for step in (4, 6, 8, 10, 12)]
    for name, mean in found[-1].load("swa").tensors.items():
        expected = torch.stack([tensors[name].double() for tensors in raw]).mean(0).float()
        torch.testing.assert_close(mean, expected, msg=name)
    assert found[-1].view_name(None) == "ema"
    assert found[-1].meta["views"]["swa"]["metric"]["nats"] > 0


def test_a_running_mean_that_starts_on_resuming_is_said(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, optim={"swa_start": 0.5, "swa_every": 1}))
    trainer.resume(next(pico_run.glob("pico/*frac75")))
    assert "holds no running mean; one starts at step 9" in capsys.readouterr().err
    assert trainer.run().meta["swa_count"] == 3


def test_the_weight_decay_taper_acts(tmp_path: Path, pico_data: DataFolder, pico_run: Path) -> None:
    tapered = Trainer(pico_recipe(pico_data, tmp_path, schedule={"weight_decay_taper_at": 0.75})).run()
    assert [record["weight_decay_multiplier"] for record in log_of(tmp_path / "pico")] == pytest.approx(
        [1] * 10 + [2 / 3, 1 / 3], abs=1e-6
    )
    assert tapered.view_id("raw") != Checkpoint.open(pico_run / "latest").view_id("raw")


def test_a_two_phase_curriculum_is_in_the_checkpoints(whole_run: Path) -> None:
    found = [Checkpoint.open(path) for path in sorted(whole_run.glob("step_*"))]
    assert [checkpoint.config["graph"]["active_loops"] for checkpoint in found] == [0] * 3 + [1] * 5 + [2] * 5
    assert "all_loops_on" in found[8].meta["phase"]


def test_resume_needs_the_same_model_and_the_optimizer_state(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path
) -> None:
    middle = next(pico_run.glob("pico/*frac75"))
    with pytest.raises(MismatchError, match=r"cannot be resumed.*: model.num_layers is 3, here 4$"):
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
    trainer.state.phases.pending.pop("init")
    with pytest.raises(NumericsError, match="training loss is nan at step 0") as caught:
        trainer.run()
    assert ("run.precision" in str(caught.value.hint)) == (trainer.state.autocast is not None)


def test_gradient_accumulation_is_the_same_step(tmp_path: Path, pico_data: DataFolder) -> None:
    gradients = []
    for name, micro_tokens in (("whole", 64), ("parts", 16)):
        data = {"micro_batch_tokens": micro_tokens}
        trainer = Trainer(pico_recipe(pico_data, tmp_path / name, data=data))
        trainer.gradients.accumulate(trainer.sampler.step_batches(0, 4, micro_tokens // 16))
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


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def test_the_log_is_one_json_object_per_step(pico_run: Path, whole_run: Path) -> None:
    records = log_of(pico_run / "pico")
    assert [record["step"] for record in records] == list(range(1, 13))
    wanted = {"step", "loss", "grad_norm", "lr_multiplier", "lr", "momentum", "active_loops", "train_seconds"}
    wanted |= {"tokens_per_second", "mean_tokens_per_second", "weight_decay_multiplier", "wall_seconds"}
    wanted |= {"scoring_seconds", "snapshot_seconds", "waited_seconds"}
    assert all(wanted == record.keys() for record in records)
    matrix_lrs = [0.02] * 6 + [0.02 * left / 6 for left in range(6, 0, -1)]
    assert [record["lr"]["matrix"] for record in records] == pytest.approx(matrix_lrs)
    assert [record["active_loops"] for record in records] == [0] * 3 + [1] * 9
    assert [record["active_loops"] for record in log_of(whole_run)] == [0] * 3 + [1] * 5 + [2] * 4
    assert log_of(whole_run)[5]["momentum"] == pytest.approx(0.8595, abs=1e-4)  # 2 of 5 steps into the first cycle


def test_a_line_at_the_terminal_says_step_loss_rates_and_clock(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(pico_recipe(pico_data, tmp_path, run={"log_every": 5})).run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    record = log_of(tmp_path / "pico")[9]
    rates = "  ".join(f"{group} {lr:.3g}" for group, lr in record["lr"].items())
    assert rates.startswith("matrix 0.01  ")
    for shown in (
        "step     10", f"loss {record['loss']:.4f}", f"lr × {record['lr_multiplier']:.3f}: {rates}",
        f"{record['tokens_per_second']:,.0f} tokens/s", f"{record['train_seconds']:.1f} s of training",
        f"{record['wall_seconds']:.1f} s in all",
    ):  # fmt: skip
        assert shown in lines[1]


def test_a_run_ends_with_one_line(tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(pico_recipe(pico_data, tmp_path, schedule={"steps": 4})).run()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("done: 4 steps, 256 tokens, ")
    assert "bpb raw " in last


def test_the_recent_rate_sees_what_the_average_hides() -> None:
    clock = StepClock(tokens_per_step=100, train_seconds=0.0)
    for step in range(1, 101):
        clock.tick(step * 1.0)
    for step in range(1, 31):
        clock.tick(100 + step * 4.0)
    assert clock.recent_rate() == pytest.approx(25)


def test_a_first_step_that_warms_up_is_not_held_against_the_rate() -> None:
    clock = StepClock(tokens_per_step=100, train_seconds=50.0)
    for second in (90.0, 91.0, 92.0, 93.0, 94.0):
        clock.tick(second)
        clock.require(minimum=99.0)
    with pytest.raises(PgolfError, match=r"100 tokens/s over steps 2 to 5; run\.min_tokens_per_second is 101"):
        clock.require(minimum=101.0)


def test_a_run_that_is_too_slow_is_stopped_at_its_fifth_step(tmp_path: Path, pico_data: DataFolder) -> None:
    with pytest.raises(PgolfError, match=r"min_tokens_per_second is 1,000,000,000,000; stopped"):
        Trainer(pico_recipe(pico_data, tmp_path / "slow", run={"min_tokens_per_second": 1e12})).run()
    assert len(log_of(tmp_path / "slow" / "pico")) == 5
    Trainer(pico_recipe(pico_data, tmp_path / "fast", run={"min_tokens_per_second": 1e-3})).run()


def test_a_log_that_cannot_be_written_ends_the_run_with_its_checkpoints_intact(
    tmp_path: Path, pico_data: DataFolder
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path))
    (tmp_path / "pico" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(
        PgolfError, match=r"could not write the log .*train\.jsonl.*checkpoints saved before are intact"
    ):
        trainer.run()
    assert Checkpoint.open(tmp_path / "latest").meta["phase"] == "init"


def test_a_link_that_cannot_be_made_is_said_and_the_checkpoint_is_there(tmp_path: Path, pico_data: DataFolder) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(PgolfError, match=r"saved .*step_000000-init, but could not point .*latest at it"):
        Trainer(pico_recipe(pico_data, tmp_path)).run()
    assert Checkpoint.open(tmp_path / "pico" / "step_000000-init").load("raw")


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, pico_data: DataFolder) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PgolfError, match="could not make the run's folder") as caught:
        Trainer(pico_recipe(pico_data, tmp_path / "file")).run()
    assert "run.checkpoint_root" in str(caught.value.hint)


def test_a_torn_log_line_does_not_swallow_the_next(tmp_path: Path, pico_data: DataFolder, pico_run: Path) -> None:
    log = pico_run / "pico" / "train.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "lo')
    trainer = Trainer(pico_recipe(pico_data, pico_run))
    trainer.resume(next(pico_run.glob("pico/*frac75")))
    (pico_run / "pico" / "step_000012-final").rename(tmp_path / "aside")
    trainer.run()
    lines = log.read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "lo']
    assert [json.loads(line)["step"] for line in lines[2:]] == [10, 11, 12]


def test_a_deterministic_run_takes_deterministic_kernels_and_leaves_the_choice_as_it_was(
    pico_data: DataFolder, tmp_path: Path, pico_checkpoint: Checkpoint
) -> None:
    run, seen = Trainer(pico_recipe(pico_data, tmp_path / "own", run={"deterministic": True})), []
    step = run.timed_step
    run.timed_step = lambda at: seen.append(torch.are_deterministic_algorithms_enabled()) or step(at)  # type: ignore[method-assign]
    final = run.run()
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert final.view_id("raw") == pico_checkpoint.view_id("raw")

"""The state of a run goes to a checkpoint and comes back whole."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError
from tests.conftest import pico_recipe
from trainer.run.background import BackgroundWriter
from trainer.run.loop import Trainer
from trainer.run.reserve import Reserve
from trainer.run.resuming import require_same_steps
from trainer.run.saving import save
from trainer.run.state import RunState
from trainer.step.future_heads import state_of

EVERYTHING: dict[str, dict[str, Any]] = {
    "model": {"num_loops": 2},
    "loss": {"future_tokens": 1},
    "optim": {"swa_start": 0.25, "swa_every": 2, "power_ema_sigmas": (0.05, 0.1), "power_ema_snapshots": 4},
    "schedule": {"all_loops_at": 0.6, "seconds": 1e6, "stages": [{"at": 0.3, "seq_len": 8, "batch_tokens": 48}]},
    "checkpoint": {"every_steps": 2, "metric": "final", "metric_tokens": 40, "max_in_flight": 0},
}


def whole(state: RunState) -> dict[str, Any]:
    """Everything that a step changes, as values that can be compared; clocks of this process aside."""
    averages = state.averages
    assert averages.ema
    assert averages.swa
    assert averages.power_ema
    tensors: dict[str, Tensor] = {
        **{f"raw.{name}": tensor for name, tensor in state.model.state_dict().items()},
        **{f"ema.{name}": tensor for name, tensor in averages.ema.shadow.items()},
        **{f"swa.{name}": tensor for name, tensor in averages.swa.mean.items()},
        **averages.power_ema.state(),
        **state.optimizer.state(),
        **state_of(state.heads),
    }
    return {
        "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
        "graph": state.model.graph,
        "swa_count": averages.swa.count,
        "numbers": (state.step, state.train_seconds, state.snapshot_step, state.progress, state.reserve, state.place),
        "ahead": sorted(state.phases.pending.keys() - {"init"}),  # which only step 0 reaches
        "behind": state.periodic.passed,
        "waits": state.waits.record(),
        "training_seconds": round(state.phase_times.so_far()["train_plain"], 3),
    }


def advance(trainer: Trainer, num_steps: int) -> None:
    """Take steps as the loop does, without what it writes."""
    state = trainer.state
    for _ in range(num_steps):
        at = state.progress
        state.update_graph(at)
        if state.update_stage(at):
            trainer.begin_stage()
        state.phases.due(state.step, at)
        state.periodic.due(state.step, state.train_seconds)
        trainer.timed_step(at)


@pytest.mark.parametrize("num_steps", [1, 5, 9])  # before the running mean, in it, after all loops are on
def test_a_state_comes_back_from_its_checkpoint_whole(tmp_path: Path, pico_data: DataFolder, num_steps: int) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, **EVERYTHING))
    state = trainer.state
    state.reserve = Reserve(3.0, 1.0, 1.0, 1.0, "measured")
    state.phase_times.add("train_plain", 1234.5)
    state.waits.scoring_seconds = 2.25
    advance(trainer, num_steps)
    with BackgroundWriter(0) as writer:
        path = save(state, writer, "by_hand")
    # The checkpoint stands before a step, where the loop asks for boundaries once more.
    state.phases.due(state.step, state.progress)
    state.periodic.due(state.step, state.train_seconds)

    other = Trainer(pico_recipe(pico_data, tmp_path, **EVERYTHING, run={"name": "resumed"}))
    before = whole(other.state)
    other.resume(path)
    ours, theirs = whole(state), whole(other.state)
    saved = Checkpoint.open(path).meta["checkpoint_waits"]  # the write itself is waited for after meta.json is made
    assert theirs.pop("waits") == saved
    assert ours.pop("waits")["scoring_seconds"] == saved["scoring_seconds"] == 2.25
    assert theirs["tensors"].keys() == ours["tensors"].keys()
    for name, tensor in ours.pop("tensors").items():
        assert torch.equal(theirs["tensors"][name], tensor), name
    del theirs["tensors"]
    assert theirs == ours
    assert theirs["numbers"] != before["numbers"]

    # What follows is bit for bit the same as well.
    assert other.state.parents == [Checkpoint.open(path).view_id("raw")]
    advance(trainer, 2)
    advance(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(*(t.model.parameters() for t in (trainer, other)), strict=True))


def test_a_new_field_of_the_state_is_thought_of_here() -> None:
    fixed = {"recipe", "ranks", "data", "autocast"}
    tensors = {"model", "optimizer", "averages", "heads", "rounding"}
    numbers = {"step", "train_seconds", "snapshot_step", "place", "reserve"}
    numbers |= {"phases", "periodic", "waits", "phase_times"}
    of_the_process = {"clock", "schedule_clock", "earlier_wall_seconds", "provenance", "parent"}
    assert {each.name for each in fields(RunState)} == fixed | tensors | numbers | of_the_process


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"batch_tokens": 2}, r"data.batch_tokens is \d+ there, \d+ here; its 3 steps"),
        ({"seq_len": 2}, r"data.seq_len is \d+ there, \d+ here"),
    ],
)
def test_steps_of_another_size_are_refused_by_name(
    tmp_path: Path, pico_data: DataFolder, data: dict[str, int], message: str
) -> None:
    """Position and tokens seen are counted in steps; factors of the recipe's own sizes are given."""
    trainer = Trainer(pico_recipe(pico_data, tmp_path))
    advance(trainer, 3)
    with BackgroundWriter(0) as writer:
        path = save(trainer.state, writer, "by_hand")
    own = trainer.recipe.data
    smaller = {key: getattr(own, key) // factor for key, factor in data.items()}
    other = Trainer(pico_recipe(pico_data, tmp_path, data=smaller, run={"name": "other"}))
    with pytest.raises(MismatchError, match=message) as refused:
        require_same_steps(Checkpoint.open(path), other.recipe)
    (key,) = data
    assert f"--set data.{key}={getattr(own, key)}" in str(refused.value.hint)
    with pytest.raises(MismatchError):
        other.resume(path)
    assert other.state.step == 0

    # micro-batches are a matter of memory: the same tokens, the same position
    halved = Trainer(pico_recipe(pico_data, tmp_path, data={"micro_batch_tokens": own.seq_len}, run={"name": "halved"}))
    halved.resume(path)
    assert halved.state.facts()["tokens_seen"] == 3 * own.batch_tokens


def test_another_seed_is_refused_by_name_and_said_of_a_branch(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed draws the order of the text, so that a run with two of them would read some windows twice."""
    trainer = Trainer(pico_recipe(pico_data, tmp_path))
    advance(trainer, 2)
    with BackgroundWriter(0) as writer:
        path = save(trainer.state, writer, "by_hand")
    seed = trainer.recipe.run.seed
    other = Trainer(pico_recipe(pico_data, tmp_path, run={"seed": seed + 1}))
    with pytest.raises(MismatchError, match=f"run.seed is {seed} there, {seed + 1} here") as refused:
        other.resume(path)
    assert f"--set run.seed={seed}" in str(refused.value.hint)
    assert other.state.step == 0

    capsys.readouterr()
    Trainer(pico_recipe(pico_data, tmp_path, run={"name": "same"})).resume(path)
    assert "run.seed" not in capsys.readouterr().err
    branch = Trainer(pico_recipe(pico_data, tmp_path, run={"name": "branch", "seed": seed + 1}))
    branch.resume(path)
    assert branch.state.step == 2
    assert f"run.seed is {seed} there, {seed + 1} here: from step 2 on" in capsys.readouterr().err


def test_a_checkpoint_without_a_recipe_tells_its_steps_by_its_tokens(tmp_path: Path, pico_data: DataFolder) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path))
    advance(trainer, 2)
    with BackgroundWriter(0) as writer:
        path = save(trainer.state, writer, "by_hand")
    checkpoint = Checkpoint.open(path)
    del checkpoint.meta["recipe"]
    require_same_steps(checkpoint, trainer.recipe)
    checkpoint.meta["tokens_seen"] *= 2
    with pytest.raises(MismatchError, match=r"data\.batch_tokens is"):
        require_same_steps(checkpoint, trainer.recipe)

"""Several real processes under torchrun are one process, only faster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import TRAINING_FILE, Checkpoint, read_tensors
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests import processes
from tests.conftest import pico_recipe, write_recipe
from trainer.config import Recipe
from trainer.run.loop import Trainer
from trainer.step.batches import WindowSampler
from trainer.step.gradients import micro_batch_tokens

REPOSITORY = Path(__file__).parents[2]

Start = Callable[..., subprocess.CompletedProcess[str]]


def torchrun(num_processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module or script under the real torchrun, on this machine's loopback."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )


def recipe_of(root: Path, data: DataFolder, precision: str, /, **tables: dict[str, Any]) -> Recipe:
    """The pico recipe with 20 steps, a checkpoint amid them, and MLPs that only re-visits use."""
    return pico_recipe(
        data,
        root,
        run={"precision": precision, "warmup_steps": 1},  # which changes nothing
        data={"batch_tokens": 96, **tables.get("data", {})},  # 6 sequences: for 1, 2 or 3 ranks
        model={"untied_loop_mlps": True},
        schedule={"steps": 20, "seconds": 1e6},  # a cap, so that ranks must agree on what it leaves free
        checkpoint={"phases": ("final",), "fractions": (), "steps": (10,), "metric_tokens": 400},
        optim={"swa_start": 0.5, "swa_every": 2, **tables.get("optim", {})},
    )


def recipe_file(folder: Path, data: DataFolder, precision: str, /, **tables: dict[str, Any]) -> Path:
    """That recipe as TOML; its run goes to FOLDER/checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(recipe_of(folder / "checkpoints", data, precision, **tables), folder / "recipe.toml")


def train(num_processes: int, recipe: Path, *arguments: str, start: Start = processes.run_ranks) -> Checkpoint:
    """The final checkpoint of a run of several processes, started by `start`."""
    done = start(num_processes, "-m", "trainer", str(recipe), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("-final  bpb") == 1  # one rank speaks
    return Checkpoint.open(recipe.parent / "checkpoints" / "latest")


def farthest(one: Checkpoint, other: Checkpoint) -> float:
    """The largest difference of any number of any view."""
    assert set(one.meta["views"]) == set(other.meta["views"]) == {"raw", "ema", "swa"}
    worst = 0.0
    for view in one.meta["views"]:
        ours, theirs = one.load(view).tensors, other.load(view).tensors
        worst = max(worst, *(float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].numel()))
    return worst


def losses_of(checkpoint: Checkpoint) -> list[float]:
    lines = (checkpoint.path.parent / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Checkpoint:
    """The final checkpoint of one process in float64."""
    return Trainer(recipe_of(tmp_path_factory.mktemp("alone"), pico_data, "fp64")).run()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Checkpoint:
    """The final checkpoint of two processes in float64."""
    return train(2, recipe_file(tmp_path_factory.mktemp("pair"), pico_data, "fp64"))


def test_two_processes_are_one_process_after_20_steps(alone: Checkpoint, pair: Checkpoint) -> None:
    assert (alone.meta["world_size"], pair.meta["world_size"]) == (1, 2)
    assert farthest(alone, pair) < 1e-9
    assert len(losses_of(alone)) == len(losses_of(pair)) == 20  # one rank writes the log
    assert losses_of(alone) == pytest.approx(losses_of(pair), abs=2e-6)  # logged to six digits


@pytest.mark.long
def test_two_processes_are_one_process_in_float32_to_its_rounding(
    tmp_path: Path, pico_data: DataFolder, alone: Checkpoint
) -> None:
    two = train(2, recipe_file(tmp_path, pico_data, "fp32"), start=torchrun)
    assert losses_of(two) == pytest.approx(losses_of(alone), abs=1e-3)


@pytest.mark.long
def test_three_processes_that_no_bank_divides_among_are_one_process(tmp_path: Path, pico_data: DataFolder) -> None:
    """Banks of 1 to 6 matrices, some unused before the loops; micro-batches; no clipping, whose path differs."""
    changes = {"data": {"micro_batch_tokens": 16}, "optim": {"grad_clip": 0.0}}
    one = Trainer(recipe_of(tmp_path / "one", pico_data, "fp64", **changes)).run()
    three = train(3, recipe_file(tmp_path / "three", pico_data, "fp64", **changes), start=torchrun)
    assert three.meta["world_size"] == 3
    assert farthest(one, three) < 1e-9


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, pico_data: DataFolder, alone: Checkpoint, pair: Checkpoint
) -> None:
    middles = [next(final.path.parent.glob("step_000010-*")) for final in (alone, pair)]
    states = [read_tensors(middle / TRAINING_FILE) for middle in middles]
    assert states[0].keys() == states[1].keys()  # the file does not know how many wrote it
    assert (
        max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0] if states[0][key].numel()) < 1e-9
    )
    trainer = Trainer(recipe_of(tmp_path / "from_two", pico_data, "fp64"))
    trainer.resume(middles[1])
    assert farthest(trainer.run(), alone) < 1e-9
    two = train(2, recipe_file(tmp_path / "from_one", pico_data, "fp64"), "--resume", str(middles[0]), start=torchrun)
    assert farthest(two, alone) < 1e-9


def test_resuming_with_as_many_processes_changes_no_bit(
    tmp_path: Path, pico_data: DataFolder, pair: Checkpoint
) -> None:
    middle = next(pair.path.parent.glob("step_000010-*"))
    resumed = train(2, recipe_file(tmp_path, pico_data, "fp64"), "--resume", str(middle))
    assert [resumed.view_id(view) for view in ("raw", "ema", "swa")] == [
        pair.view_id(view) for view in ("raw", "ema", "swa")
    ]


RANKS_SCRIPT = """
import torch
from torch import nn
from pgolf_post.base.ranks import end_process
from trainer.step.distributed import TrainingRanks
from trainer.optim.optimizer import Optimizer
from trainer.optim.settings import OptimSettings

ranks = TrainingRanks.join()
rows = torch.arange(35.0, dtype=torch.float64).view(7, 5)
stack = torch.cat([rows] * ranks.world_size) * (ranks.rank + 1)  # 7 rows for each rank
mine = ranks.reduce_scatter(stack).wait()
assert torch.equal(mine, rows * sum(range(1, ranks.world_size + 1)))
everyones = ranks.all_gather(rows + ranks.rank).wait()
assert torch.equal(everyones, torch.cat([rows + rank for rank in range(ranks.world_size)]))
under_way = [ranks.reduce_scatter(stack + i) for i in range(5)]  # several at once, waited for out of order
finish = ranks.begin_sum_([late := torch.ones(2)])
assert all(torch.equal(t.wait(), mine + i * ranks.world_size) for i, t in reversed(list(enumerate(under_way))))
changed = under_way[0].wait().zero_()
assert under_way[0].wait() is changed and not changed.any()  # waiting again brings nothing back
finish()
assert late.tolist() == [ranks.world_size] * 2
mixed = [torch.full((2, 3), float(ranks.rank)), torch.ones(4, dtype=torch.float64), torch.ones(())]
ranks.sum_each_(mixed)
total = sum(range(ranks.world_size))
assert torch.equal(mixed[0], torch.full((2, 3), float(total)))
assert torch.equal(mixed[1], torch.full((4,), float(ranks.world_size), dtype=torch.float64))
assert float(mixed[2]) == ranks.world_size
assert ranks.sum_floats(0.5, 1.0) == (0.5 * ranks.world_size, float(ranks.world_size))
assert ranks.main_float(100.0 + ranks.rank) == 100.0
model = nn.ModuleList([*(nn.Linear(6, 4, bias=False) for _ in range(4)), nn.Embedding(2, 2)])
optimizer = Optimizer(model, OptimSettings(), ranks)
share = -(-4 // ranks.world_size)  # of three ranks two have matrices, one has padding
assert [tuple(bank.momenta.shape) for bank in optimizer.banks] == [(share, 4, 6)]
assert [tuple(moment.shape) for moment in optimizer.state().values()] == [(4, 6)] * 4
assert optimizer.step(1.0, 0.9) == 0.0  # nothing has a gradient, so nothing is sent
ranks.wait()
print("ok", flush=True)
ranks.leave()
end_process(0)
"""


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.long), 3])
def test_what_ranks_share_does_not_depend_on_how_many_they_are(num_processes: int) -> None:
    done = processes.run_ranks(num_processes, "-c", RANKS_SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == num_processes


def test_ranks_that_are_told_to_stop_save_together_and_exit_143(tmp_path: Path, pico_data: DataFolder) -> None:
    """Two processes get SIGTERM as torchrun passes it on to all of its own."""
    recipe = recipe_file(tmp_path, pico_data, "fp32")
    more = ("schedule.steps=1000000", "schedule.seconds=1e9", f"checkpoint.steps={list(range(1, 200))}")
    words = ["-m", "trainer", str(recipe), *(word for each in more for word in ("--set", each))]
    ranks = [processes.Process(words, env, stderr=subprocess.PIPE) for env in processes.places_of_ranks(2)]
    assert ranks[0].stderr
    next(line for line in ranks[0].stderr if line.startswith("saved "))  # both step
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], said
    assert "Traceback" not in "".join(said)
    start = "go on: torchrun --standalone --nproc_per_node=2 "
    (go_on,) = [line for line in said[0].splitlines() if line.startswith(start)]
    saved = Checkpoint.open(go_on.rpartition(" ")[2])
    assert saved.path.name.endswith("-interrupted")
    assert (saved.path / TRAINING_FILE).is_file()
    assert saved.load("raw").id == saved.view_id("raw")


@pytest.mark.long
def test_a_dry_run_under_torchrun_is_refused(tmp_path: Path, pico_data: DataFolder) -> None:
    done = torchrun(2, "-m", "trainer", str(recipe_file(tmp_path, pico_data, "fp32")), "--dry-run")
    assert done.returncode != 0
    assert "start it without torchrun" in done.stderr


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_a_steps_windows_without_overlap(pico_data: DataFolder, world_size: int) -> None:
    sampler = WindowSampler(pico_data, 16, seed=1)
    whole = torch.cat([inputs for inputs, _ in sampler.step_batches(3, 8, 1)])
    shared = [list(sampler.step_batches(3, 8, 1, rank, world_size)) for rank in range(world_size)]
    gathered = torch.cat([inputs for batches in zip(*shared, strict=True) for inputs, _ in batches])
    assert torch.equal(gathered, whole)


def test_batches_that_ranks_cannot_share_equally_are_refused(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path)  # 64 tokens a step, sequences of 16
    assert [micro_batch_tokens(recipe, world_size) for world_size in (1, 2, 4)] == [64, 32, 16]
    with pytest.raises(SettingsError, match="64 cannot be shared by 3 ranks"):
        micro_batch_tokens(recipe, 3)
    with pytest.raises(SettingsError, match="8 ranks"):
        micro_batch_tokens(recipe, 8)
